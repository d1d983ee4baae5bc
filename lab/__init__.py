"""The machinery behind the experiment. Nobody has to open it to change the recipe.

    errors      how a program ends when something goes wrong
    evaluate    predictions, confusion matrix, scores of the classes, misclassified images
    figures     one function per figure
    finder      the learning rate that `lr_find` suggests, and its median over several finders
    learner     the `Learner`, its optimizer, loss and progress; training in several processes
    loader      files → pixels → whole batches
    page        every misclassified image on one page of HTML, with page.html, its template
    processes   what the processes of one run agree on (accelerate)
    report      a run as one page of Markdown
    results     what a run writes beside its checkpoint: tables, figures, report, weights
    runs        the folder of a run: options, lock, atomic writes, checkpoint, resume
    sources     where the images come from
    speed       what makes training fast: precision, recorded GPU steps, memory layout, memory

Imports go one way: nothing here imports the experiment, its callbacks or its network.
"""

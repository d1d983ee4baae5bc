"""Asks the server of docs/elsewhere.md, with many clients at once: python tests/serve.py RUN IMAGE …

It needs gradio, and therefore an environment of its own.
"""
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from gradio_client import Client, handle_file

from predict import load_run

CLIENTS = 16


def main(run: str, *images: str):
    expected = {image: load_run(run).predict(image)[0] for image in images}
    server = next(o for o in re.findall(r'```python\n(.*?)```', (ROOT/'docs/elsewhere.md').read_text(), re.DOTALL)
                  if 'gradio' in o)
    made = {}
    exec(server.replace('runs/X', run), made)
    _, url, _ = made['demo'].queue(default_concurrency_limit=4).launch(prevent_thread_lock=True, quiet=True)

    def ask(i: int) -> int:
        client = Client(url, verbose=False)
        for image in images:
            answer = client.predict(handle_file(image), api_name='/classify')
            if answer['label'] != expected[image]: raise ValueError(f'{image}: {answer}, not {expected[image]}')
        return len(images)
    with ThreadPoolExecutor(CLIENTS) as pool: answers = sum(pool.map(ask, range(CLIENTS)))
    learn = made['learn']
    if (learn.logger, learn.create_mbar) != (print, True): raise ValueError('the learner is not as it was')
    print(f'{answers} right answers for {CLIENTS} clients at once')
    made['demo'].close()


if __name__ == '__main__': main(*sys.argv[1:])

import base64
import io
import json
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

from lab.page import write_page
from train_fastai import main

METRICS = dict(test_images=10_000, test_accuracy=0.9273, epochs=24, seed=42, quick_look=False)
NAMES = ['cat', '<b>x</b>', '</script><script>document.title = "run"</script>']


def make_page(names: list[str], n: int, charts: dict | None = None, **metrics
              ) -> tuple[str, pd.DataFrame, torch.Tensor]:
    """A page of `n` errors that go round the classes `names`; its table, and its images, each of one colour."""
    i = np.arange(n)
    actual, predicted = i % len(names), (i % len(names) + 1 + i // len(names) % (len(names) - 1)) % len(names)
    wrong = pd.DataFrame(dict(
        file=[f'test/{names[a]}/{k}.png' for k, a in enumerate(actual)], actual=[names[a] for a in actual],
        predicted=[names[p] for p in predicted], probability=0.5 + i / (2 * n + 1), loss=np.sort(i / 7.)[::-1]))
    classes = pd.DataFrame({'class': names, 'images': 1000, 'recall': 0.9, 'precision': 0.9})
    colours = torch.stack([torch.from_numpy(o) for o in (i % 251, i // 251 * 10, 100 + 0 * i)], 1).to(torch.uint8)
    images = colours[:, :, None, None].expand(n, 3, 32, 32)
    return write_page(METRICS | metrics, wrong, classes, images, charts or {}), wrong, images


def read_data(page: str) -> dict:
    data, = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_it_needs_no_server_and_its_template_is_short():
    page, *_ = make_page(NAMES, 12, {'Finder': b'png'})
    assert "default-src 'none'; img-src data:" in page
    assert 'http' not in page.replace('http-equiv', '')
    sources = re.findall(r'(?:src="|url\()([^")]*)', page)
    assert len(sources) == 2
    for source in sources: assert source.startswith('data:image/')
    assert len((ROOT/'lab/page.html').read_text().splitlines()) <= 150


def test_its_data_are_those_of_the_tables():
    page, wrong, _ = make_page(['cat', 'dog', 'eel'], 7)
    data = read_data(page)
    assert data['classes'] == ['cat', 'dog', 'eel']
    assert data['right'] == [997, 998, 998]
    assert [row[0] for row in data['wrong']] == list(wrong.file)
    assert [row[1:3] for row in data['wrong']] == [[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1]]
    assert [row[3] for row in data['wrong']] == pytest.approx(list(wrong.probability), abs=1e-4)
    assert data['cells'][0] == [0, 1, 2]
    assert sorted(data['cells'][1:]) == [[0, 2, 1], [1, 0, 1], [1, 2, 1], [2, 0, 1], [2, 1, 1]]
    assert '<h1>7 of 10,000 test images are misclassified </h1>' in page
    assert '92.73 % test accuracy after 24 epochs, seed 42.' in page
    assert '<h1>1 of 10,000 test images is misclassified </h1>' in make_page(['cat', 'dog'], 1)[0]
    assert '<span class="quick">quick look</span></h1>' in make_page(['cat', 'dog'], 1, quick_look=True)[0]


def test_its_images_are_the_networks_pixel_by_pixel():
    page, _, images = make_page(['cat', 'dog', 'eel'], 300)
    uris = re.findall(r'url\(data:image/webp;base64,(.*?)\)', page)
    sheets = [Image.open(io.BytesIO(base64.b64decode(o))) for o in uris]
    assert len(sheets) == 2
    shown = np.concatenate([np.asarray(o).reshape(16, 32, 16, 32, 3).swapaxes(1, 2).reshape(256, 32, 32, 3)
                            for o in sheets])
    assert (shown[:300] == images.permute(0, 2, 3, 1).numpy()).all()


def test_a_loss_without_bound_can_be_read():
    wrong = pd.DataFrame([('a.png', 'cat', 'dog', 1., float('inf'))],
                         columns=['file', 'actual', 'predicted', 'probability', 'loss'])
    classes = pd.DataFrame({'class': ['cat', 'dog'], 'images': 5})
    data = read_data(write_page(METRICS, wrong, classes, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), {}))
    assert data['wrong'] == [['a.png', 0, 1, 1., 1e4]]


@pytest.fixture(scope='module')
def browser():
    """Chromium. (The notebook's event loop would not start beside this one, so it ends with the module.)"""
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if not program: pytest.skip('no Chromium on this machine, so nobody has looked at errors.html')
    playwright = pytest.importorskip('playwright.sync_api', reason='Playwright is not installed (requirements-dev.txt)')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=['--no-sandbox'] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Function that opens a page and returns it; errors and alerts in it fail the test."""
    complaints, contexts = [], []

    def open_page(html, width=1200, scheme='light'):
        (tmp_path/'errors.html').write_text(html, encoding='utf-8')
        contexts.append(browser.new_context(viewport=dict(width=width, height=844), color_scheme=scheme, offline=True))
        page = contexts[-1].new_page()
        for event in ('console', 'pageerror', 'dialog', 'requestfailed'): page.on(event, lambda o: complaints.append(o))
        page.goto((tmp_path/'errors.html').as_uri())
        return page
    yield open_page
    for context in contexts: context.close()
    assert complaints == []


def colour(element) -> tuple[int, int, int]:
    """The colour in the middle of an element."""
    image = Image.open(io.BytesIO(element.screenshot())).convert('RGB')
    return image.getpixel((image.width // 2, image.height // 2))


def heading(page) -> str: return page.inner_text('#chosen')


def test_a_click_on_a_cell_or_a_name_shows_its_images(show):
    page = show(make_page(['cat', 'dog', 'eel'], 100)[0])
    thumbs = page.locator('#gallery .thumb')
    assert (heading(page), thumbs.count()) == ('All errors: 100 images', 60)
    assert [cell.inner_text() for cell in page.locator('td').all()] == [
        '966', '17', '17', '16', '967', '17', '17', '16', '967']
    page.click('[title="cat → dog: 17 images"]')
    assert (heading(page), thumbs.count()) == ('cat → dog: 17 images', 17)
    assert colour(thumbs.nth(3)) == (18, 0, 100)  # every sixth error
    assert page.locator('#gallery li').nth(3).inner_text().split('\n')[-3:] == ['cat → dog', '59.0 %', '18.png']
    assert thumbs.nth(3).get_attribute('title') == 'test/cat/18.png\nloss 11.57'
    page.click('[title="actual dog"]')
    assert (heading(page), thumbs.count()) == ('dog → any other class: 33 images', 33)
    page.click('[title="predicted eel"]')
    assert (heading(page), thumbs.count()) == ('any other class → eel: 34 images', 34)
    assert page.get_attribute('[title="predicted eel"]', 'aria-pressed') == 'true'
    page.click('#all')
    assert (heading(page), thumbs.count()) == ('All errors: 100 images', 60)


def test_thousands_of_errors_are_shown_page_by_page(show):
    page = show(make_page(['cat', 'dog', 'eel'], 5000)[0])
    assert page.inner_text('#range') == '1 to 60'
    assert page.is_disabled('#previous')
    for _ in range(5): page.click('#next')
    assert page.inner_text('#range') == '301 to 360'
    assert colour(page.locator('.thumb').first) == (300 % 251, 10, 100)
    page.click('#previous')
    assert page.inner_text('#range') == '241 to 300'
    page.click('[title="predicted eel"]')
    assert page.inner_text('#range') == '1 to 60'
    page.evaluate('turnTo(27)')
    assert page.inner_text('#range') == '1,621 to 1,667'
    assert page.is_disabled('#next')
    assert page.locator('.thumb').count() == 47


def test_it_is_used_with_the_keyboard(show):
    page = show(make_page(['cat', 'dog', 'eel'], 100)[0])
    focused = 'document.activeElement.title || document.activeElement.id'
    seen = []
    for key in ('Tab', 'ArrowRight', 'ArrowDown', 'ArrowDown', 'ArrowLeft', 'ArrowLeft', 'ArrowUp', 'ArrowRight'):
        page.keyboard.press(key)
        seen.append(page.evaluate(focused))
    assert seen == ['predicted cat', 'predicted dog', 'cat → dog: 17 images', 'eel → dog: 16 images',
                    'eel → cat: 17 images', 'actual eel', 'actual dog', 'dog → cat: 16 images']
    page.keyboard.press('Enter')
    assert heading(page) == 'dog → cat: 16 images'
    page.keyboard.press('Tab')
    assert page.evaluate(focused) == 'all'  # there is one page only
    page.keyboard.press('Shift+Tab')
    assert page.evaluate(focused) == 'dog → cat: 16 images'
    page.keyboard.press('Escape')
    assert heading(page) == 'All errors: 100 images'
    page.keyboard.press('Tab')
    page.keyboard.press('Enter')
    assert page.inner_text('#range') == '61 to 100'


def test_of_many_classes_only_the_cells_with_errors_are_listed(show):
    names = [f'class {i:03}' for i in range(600)]
    page = show(make_page(names, 5000)[0])
    rows = page.locator('tbody tr')
    assert rows.count() == 501
    assert rows.last.inner_text() == 'and 4500 pairs more'
    page.fill('input', 'class 123')
    assert rows.count() == 18
    page.locator('[title="actual class 123"]').first.click()
    assert heading(page) == 'class 123 → any other class: 9 images'
    page.keyboard.press('ArrowRight')
    page.keyboard.press('Enter')
    assert re.fullmatch(r'any other class → class \d+: \d+ images', heading(page))
    page.fill('input', 'nothing of this name')
    assert rows.count() == 0


def test_names_are_shown_as_they_are_and_run_nothing(show):
    page = show(make_page(NAMES, 30)[0])
    assert page.title() == '30 of 10,000 test images are misclassified'
    assert [o.inner_text() for o in page.locator('thead button').all()] == NAMES
    page.click('[title="<b>x</b> → cat: 5 images"]')
    assert heading(page) == '<b>x</b> → cat: 5 images'
    assert '<b>x</b> → cat' in page.inner_text('#gallery li >> nth=0')
    assert page.locator('b').count() == page.locator('.thumb').count() == 5
    assert page.locator('script').count() == 2


@pytest.mark.parametrize('names', [['cat', 'dog'], [f'class {i}' for i in range(10)], [f'{i}' * 9 for i in range(50)],
                                   [f'class {i}' for i in range(51)]], ids=len)
def test_it_fits_a_phone(show, names):
    page = show(make_page(names, 200)[0], width=390)
    assert page.evaluate('document.documentElement.scrollWidth') == 390
    page.locator('tbody td button').last.click()
    box = page.locator('.thumb').first.bounding_box()
    assert 0 <= box['y'] < 844 - box['height']  # one sees what the click has brought


def test_it_follows_the_systems_colours(show):
    html, *_ = make_page(['cat', 'dog'], 9)
    back = 'getComputedStyle(document.body).backgroundColor'
    assert show(html, scheme='light').evaluate(back) == 'rgb(255, 255, 255)'
    assert show(html, scheme='dark').evaluate(back) == 'rgb(22, 22, 22)'


def test_a_run_without_an_error(show):
    page = show(make_page(['cat', 'dog'], 0)[0])
    assert heading(page) == 'All errors: 0 images'
    page.click('[title="actual cat"]')
    assert heading(page) == 'cat → any other class: 0 images'


def test_a_run_leaves_its_page(folder, tmp_path, show):
    """With its own errors and its three curves."""
    out = tmp_path/'out'
    main(data=folder, out=out, bs=4, epochs=1, seed=1)
    wrong = pd.read_csv(out/'misclassified.csv')
    page = show((out/'errors.html').read_text(encoding='utf-8'))
    assert [o.inner_text().split('\n')[-1] for o in page.locator('#gallery li').all()] == [
        file.split('/')[-1] for file in wrong.file]
    actual, predicted = wrong.iloc[0][['actual', 'predicted']]
    n = int(((wrong.actual == actual) & (wrong.predicted == predicted)).sum())
    page.click(f'[title="{actual} → {predicted}: {n} image{"s" if n > 1 else ""}"]')
    assert page.locator('.thumb').count() == n
    with Image.open(folder/wrong.file[0]) as image: expected = image.getpixel((10, 20))
    shot = Image.open(io.BytesIO(page.locator('.thumb').first.screenshot())).convert('RGB')
    assert shot.getpixel((3 * 10 + 1, 3 * 20 + 1)) == expected
    assert page.locator('.charts img').evaluate_all('o => o.map(i => [i.alt, i.complete && i.naturalWidth > 600])') == [
        ['Learning-rate finder', True], ['Loss and accuracy', True], ['Schedule', True]]
    assert '(errors.html)' in (out/'report.md').read_text(encoding='utf-8')

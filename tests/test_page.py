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

from lab.report import write_page

METRICS = dict(test_images=10_000, test_accuracy=0.9273, epochs=24, seed=42, options=dict(quick=False))
NAMES = ['cat', '<b>x</b>', '</script><script>alert("run")</script>']


def make_page(names: list[str], n: int, maps: torch.Tensor | None = None, **metrics):
    """A page of `n` errors that go round the classes `names`; its table, and its images, each of one colour."""
    i = np.arange(n)
    actual, predicted = i % len(names), (i % len(names) + 1 + i // len(names) % (len(names) - 1)) % len(names)
    wrong = pd.DataFrame(dict(
        file=[f'test/{names[a]}/{k}.png' for k, a in enumerate(actual)], actual=[names[a] for a in actual],
        predicted=[names[p] for p in predicted], probability=0.5 + i / (2 * n + 1),
        loss=[np.inf, *i[:0:-1] / 7][:n])).astype(dict(probability='float32', loss='float32'))
    classes = pd.DataFrame({'class': names, 'images': 1000, 'recall': 0.9, 'precision': 0.9})
    colours = torch.from_numpy(np.stack([i % 251, i // 251 * 10, 100 + 0 * i], 1)).to(torch.uint8)
    images = colours[:, :, None, None].expand(n, 3, 32, 32)
    return write_page(METRICS | metrics, wrong, classes, images, ROOT/'docs/cifar10', maps), wrong, images


def test_it_needs_no_server_and_runs_no_names():
    page, *_ = make_page(NAMES, 12)
    assert "default-src 'none'; img-src data:" in page
    assert [s[:11] for s in re.findall(r'(?:src="|url\()([^")]*)', page)] == ['data:image/'] * 4
    assert [page.count(s) for s in ('://', '<b>', '<script')] == [0, 0, 2]


def test_its_data_are_those_of_the_tables():
    maps = torch.rand(7, 2, 4, 3)
    page, wrong, _ = make_page(['cat', 'dog', 'eel'], 7, maps)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    h, w, values = data['maps']
    shown = np.frombuffer(base64.b64decode(values), np.uint8).reshape(7, 2, h, w)
    np.testing.assert_allclose(shown / 255, maps, atol=0.002)
    assert (data['classes'], data['right']) == (['cat', 'dog', 'eel'], [997, 998, 998])
    files, actual, predicted, probabilities, losses, _ = zip(*data['wrong'], strict=True)
    assert list(files) == list(wrong.file)
    assert [*zip(actual, predicted, strict=True)] == [(0, 1), (1, 2), (2, 0), (0, 2), (1, 0), (2, 1), (0, 1)]
    assert probabilities == pytest.approx(list(wrong.probability), abs=1e-4)
    assert losses == (1e4, 0.8571, 0.7143, 0.5714, 0.4286, 0.2857, 0.1429)  # no infinity
    assert data['cells'] == [[0, 1, 2], [0, 2, 1], [1, 0, 1], [1, 2, 1], [2, 0, 1], [2, 1, 1]]
    assert '<h1>7 of 10,000 test images are misclassified </h1>' in page
    assert '92.73 % test accuracy after 24 epochs, seed 42.' in page
    assert 'Grad-CAM' in page
    quick = make_page(['cat', 'dog'], 1, options=dict(quick=True))[0]
    assert '<h1>1 of 10,000 test images is misclassified <span class="quick">quick look</span></h1>' in quick
    assert 'Grad-CAM' not in quick
    assert '<h1>0 of 10,000 test images are misclassified </h1>' in make_page(['cat', 'dog'], 0)[0]


def test_its_images_are_the_networks_pixel_by_pixel():
    page, _, images = make_page(['cat', 'dog', 'eel'], 300)
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for *_, png in data['wrong']]
    assert (np.stack(shown) == images.permute(0, 2, 3, 1).numpy()).all()


def test_a_browser_shows_it(tmp_path):
    """In Chromium, with a mouse, a keyboard and on a phone; an error or an alert in it fails the test."""
    program = shutil.which('chromium') or shutil.which('google-chrome')
    if not program: pytest.skip('no Chromium on this machine, so nobody has looked at errors.html')
    playwright, complaints = pytest.importorskip('playwright.sync_api', reason='no Playwright'), []

    def show(names, n, **kwargs):
        maps = (torch.arange(2 * n) * 0.37 % 1).view(n, 2, 1, 1).expand(-1, -1, 4, 4)
        (tmp_path/'errors.html').write_text(make_page(names, n, maps)[0], encoding='utf-8')
        page = browser.new_page(offline=True, **kwargs)
        for event in 'console', 'pageerror', 'dialog', 'requestfailed': page.on(event, lambda o: complaints.append(o))
        page.goto((tmp_path/'errors.html').as_uri())
        return page

    def heading(page): return page.inner_text('#chosen'), page.locator('.thumb').count(), page.inner_text('#range')

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=['--no-sandbox'] if os.geteuid() == 0 else [])
        page = show(NAMES, 400, viewport=dict(width=1200, height=844))  # filters and pages, with a mouse
        assert heading(page) == ('All errors: 400 images', 60, '1 to 60')
        assert [o.inner_text() for o in page.locator('thead button').all()] == NAMES
        page.click('[title="<b>x</b> → cat: 66 images"]')
        page.click('#next')
        assert heading(page) == ('<b>x</b> → cat: 66 images', 6, '61 to 66')
        page.click('label:has-text("actual")')  # a second map shines through the first image, that of error 364
        image, map_ = np.array([364 % 251, 10, 100]), np.array([255, 1.6 * 186 - 153, 128 - 186 / 2])  # 729 · 0.37 % 1
        thumb = np.asarray(Image.open(io.BytesIO(page.locator('.thumb').first.screenshot())).convert('RGB'))
        assert thumb[thumb.shape[0] // 2, thumb.shape[1] // 2] == pytest.approx((image + map_) / 2, abs=2)

        page.keyboard.press('Escape')  # with the keyboard
        page.focus('#next')
        for key in 'Shift+Tab', 'ArrowRight', 'Enter': page.keyboard.press(key)
        assert heading(page)[0] == f'<b>x</b> → {NAMES[2]}: 67 images'
        page.set_viewport_size(dict(width=390, height=844))
        assert page.evaluate('document.documentElement.scrollWidth') == 390

        names = [f'class {i:03}' for i in range(200)]  # on a phone, dark, a list for many classes
        page = show(names, 1700, viewport=dict(width=390, height=844), color_scheme='dark')
        assert page.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(22, 22, 22)'
        page.fill('input', 'class 123')
        page.locator('[title="actual class 123"]').first.click()
        assert heading(page) == ('class 123 → any other class: 8 images', 8, '')
        assert 0 <= page.locator('.thumb').first.bounding_box()['y'] < 844 - 96  # one sees what the click has brought
        browser.close()
    assert complaints == []

"""The studio, driven in a browser against a server of the embedded model and three tiny ones, which wants a key.

Run with -m browser; the extra "browser" brings Playwright, and chromium is the system's. The
screenshots are kept as the file that STUDIO_PNG names in the environment: docs/studio.png is made by `-k screenshots`.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.model_directories import write_class_model, write_image_model, write_video_model
from helpers.paths import ROOT
from helpers.students import write_student
from helpers.upscalers import srvgg_tensors, write_upscaler
from PIL import Image

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=60_000)

pytestmark = pytest.mark.browser

KEY = "a-key-for-tests"
WIDTHS = {"make": 1280, "edit": 820, "look": 390}
HEIGHT = 960

UNNAMED = """() => {
  const named = (each) => each.tagName === 'IMG' ? each.hasAttribute('alt')
    : each.labels?.length || each.ariaLabel || each.getAttribute('aria-labelledby') || each.textContent.trim()
      || each.querySelector('img[alt]') || ['alert', 'status'].includes(each.getAttribute('role'));
  const all = document.querySelectorAll('button, input, select, textarea, canvas, img, dialog, [role]');
  return [...all].filter((each) => !named(each)).map((each) => each.outerHTML);
}"""
"""Controls that a screen reader would have no name for."""


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server's."""
    folder = tmp_path_factory.mktemp("studio")
    pictures = write_image_model(folder / "pictures")
    models = ["demo", write_class_model(folder / "labels"), write_video_model(folder / "movies"), pictures]
    named = [word for model in models for word in ("-m", str(model))]
    named += ["--student", str(write_student(folder / "quick-one", pictures, guidance=1.0, temperature=0.8))]
    named += ["--upscaler", str(write_upscaler(folder / "x4.pth", srvgg_tensors()))]
    command = [
        sys.executable,
        "-m",
        "mlx_starflow",
        "serve",
        "--port",
        "0",
        "--gallery",
        str(folder / "gallery"),
        *named,
    ]
    environment = {**os.environ, "MLX_STARFLOW_API_KEY": KEY}
    log = (folder / "log").open("w")
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line, (folder / "log").read_text()
    yield line.split()[-1]
    server.terminate()
    server.wait(60)
    log.close()


@pytest.fixture(scope="module")
def context(address: str) -> Iterator[Any]:
    """A browser that knows the key."""
    names = ("chromium", "chromium-browser", "google-chrome")
    with sync_api.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, names)), None)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-dev-shm-usage"])
        context = browser.new_context(viewport={"width": WIDTHS["make"], "height": HEIGHT}, base_url=address)
        context.set_default_timeout(60_000)
        page = context.new_page()
        page.goto("/")
        page.locator("#key [name=key]").fill("not the key at all")
        page.get_by_role("button", name="Enter").click()
        expect(page.locator("#key .error")).to_have_text("The key is wrong")
        page.locator("#key [name=key]").fill(KEY)
        page.get_by_role("button", name="Enter").click()
        expect(page.locator("html")).to_have_attribute("data-ready", "true")
        page.close()
        yield context
        browser.close()


@pytest.fixture
def page(context: Any, address: str) -> Iterator[Any]:
    """The studio, freshly opened. It asks nobody else for anything, and its console stays free of faults."""
    page, foreign, faults = context.new_page(), [], []
    page.on("request", lambda request: foreign.append(request.url) if not request.url.startswith(own) else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda told: faults.append(told.text) if "Content Security" in told.text else None)
    own = (address, "data:", "blob:")
    open_studio(page)
    yield page
    page.close()
    assert not foreign and not faults


def open_studio(page: Any) -> None:
    page.goto("/")
    expect(page.locator("html")).to_have_attribute("data-ready", "true")


def make(page: Any, prompt: str, seed: int, **values: object) -> None:
    """Fill in the form, and make."""
    form = page.locator("#make-form")
    form.locator("[name=prompt]").fill(prompt)
    form.locator("[name=seed]").fill(str(seed))
    for name, value in values.items():
        form.locator(f"[name={name}]").fill(str(value))
    form.get_by_role("button", name="Make").click()


def made(page: Any, count: int = 1) -> None:
    expect(page.locator(".place.finished")).to_have_count(count)


def edit_newest(page: Any) -> None:
    """Open the newest picture of the history for editing."""
    page.locator("#history .card button").first.click()
    page.locator("#viewer").get_by_role("button", name="Edit").click()
    expect(page.locator("#easel canvas")).to_be_visible()


def pixels(page: Any, url: str) -> Image.Image:
    return Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB")


def test_make_and_reload(page, address):
    form = page.locator("#make-form")
    form.locator("[name=n]").fill("2")
    form.locator("[name=seed]").fill("7")
    form.locator("[name=prompt]").fill("a slice of pizza")
    form.locator("[name=prompt]").press("Control+Enter")
    made(page, 2)
    # Two blocks' previews, and the picture itself.
    expect(page.locator(".place").first.locator(".steps img")).to_have_count(3)
    expect(page.locator("#cancel")).to_be_disabled()
    page.reload()
    cards = page.locator("#history .card")
    expect(cards).to_have_count(2)
    expect(cards.first).to_contain_text("seed 8")
    # Two side by side, and what differs.
    page.get_by_label("Compare").nth(0).check()
    page.get_by_label("Compare").nth(1).check()
    page.get_by_role("button", name="Compare both").click()
    expect(page.locator("#comparison .differs th")).to_have_text(["Seed", "Certificate"])
    page.keyboard.press("Escape")
    # Its settings again, and its file.
    cards.last.get_by_role("button").click()
    with page.expect_download() as download:
        page.locator("#viewer").get_by_role("link", name="Download").click()
    assert Image.open(download.value.path()).size == (128, 128)
    page.locator("#viewer").get_by_role("button", name="Use its settings").click()
    assert form.locator("[name=seed]").input_value() == "7"
    assert form.locator("[name=prompt]").input_value() == "a slice of pizza"
    assert form.locator("[name=method]").input_value() == "auto"  # the model has a plan


def test_cancel(page):
    make(page, "a rocket", 1, size="1024x1024")
    expect(page.locator("#now")).to_contain_text("flow, block")
    make(page, "a cat", 1, size="")
    expect(page.locator("#waiting summary")).to_have_text("1 waiting")
    page.locator("#waiting summary").click()
    page.get_by_role("button", name="Cancel Making “a cat”").click()
    expect(page.locator("#waiting summary")).to_have_text("0 waiting")
    # A reload changes nothing for what runs.
    page.reload()
    expect(page.locator("#now")).to_contain_text("Making “a rocket”")
    page.locator("#cancel").click()
    expect(page.locator("#now")).to_have_text("Idle")
    states = [job["state"] for job in page.request.get("/api/jobs").json()["jobs"]]
    assert states[:2] == ["cancelled", "cancelled"]


def test_mistakes_are_said_where_they_happen(page, tmp_path):
    make(page, "a cat", 1, size="65x64")
    error = page.locator("#make-form .error.own")
    expect(error).to_contain_text("A size of 65x64 does not fit")
    size = page.locator("#make-form [name=size]")
    assert size.get_attribute("aria-describedby") == error.get_attribute("id")
    make(page, "a cat", 1, size="large")
    expect(error).to_contain_text("A size is WIDTHxHEIGHT in pixels")
    make(page, "a cat", 1, size="", n="1.5")
    expect(error).to_have_text("A whole number is wanted here")
    (tmp_path / "no.png").write_text("no picture")
    page.get_by_role("tab", name="Look").click()
    page.locator("#look-form").get_by_role("button", name="Look").click()
    expect(page.locator("#look-source .error")).to_have_text("Choose a picture first.")
    page.locator("#look-source input").set_input_files(tmp_path / "no.png")
    page.locator("#look-form").get_by_role("button", name="Look").click()
    expect(page.locator("#look-source .error")).to_contain_text("The image cannot be read")
    page.route("**/api/jobs", lambda route: route.abort())
    look_again = "document.dispatchEvent(new Event('visibilitychange'))"
    page.evaluate(look_again)
    expect(page.locator("#lost")).to_contain_text("The server does not answer")
    page.unroute("**/api/jobs")
    page.evaluate(look_again)
    expect(page.locator("#lost")).to_be_hidden()


def test_mask_and_inpaint(page):
    make(page, "red apple", 3)
    made(page)
    edit_newest(page)
    assert page.locator("#inpaint-form [name=prompt]").input_value() == "red apple"
    page.get_by_role("button", name="Inpaint").click()
    expect(page.locator("#inpaint-form .error")).to_have_text("Paint over what shall be made anew first")
    # The left half with the mouse, and the upper right corner with the keyboard.
    page.locator("#brush").fill("50")
    box = page.locator("#easel canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"])
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"], steps=4)
    page.mouse.up()
    for key in [*["Shift+ArrowUp"] * 10, *["Shift+ArrowRight"] * 8, "Space"]:
        page.keyboard.press(key)
    page.locator("#inpaint-form summary").click()
    page.get_by_label("Steps").fill("4")
    page.get_by_label("Rounds").fill("1")
    with page.expect_request("**/api/inpaint*") as sent:
        page.get_by_role("button", name="Inpaint").click()
    asked = sent.value.post_data_json
    mask = pixels_of_url(asked["mask"])
    assert mask.size == (128, 128)
    assert [mask.getpixel(at)[3] for at in ((20, 64), (120, 8), (100, 100))] == [0, 0, 255]
    card = page.locator("#edit-results .card")
    expect(card).to_contain_text("inpaint")
    before, after = (pixels(page, f"/api/gallery/{id}.png") for id in (asked["image"], card.get_attribute("data-id")))
    assert before.size == after.size and before.tobytes() != after.tobytes()


def pixels_of_url(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA")


def test_paths(page):
    make(page, "a dog", 3)
    made(page)
    edit_newest(page)
    page.get_by_role("radio", name="Re-prompt").check()
    page.get_by_label("What it shall show").fill("a cat")
    page.locator("#reprompt-form [name=count]").fill("3")
    page.locator("#reprompt-form").get_by_role("button", name="Re-prompt").click()
    slider = page.get_by_label("Path: strength")
    expect(page.locator(".path .steps img")).to_have_count(3)
    assert slider.get_attribute("aria-valuetext") == "strength 0"
    slider.press("End")
    assert slider.get_attribute("aria-valuetext") == "strength 1"
    assert page.locator(".path .growing img").get_attribute("alt") == "strength 1"
    # From the one picture to that which came of it.
    page.get_by_role("radio", name="Interpolate").check()
    page.locator("#edit-second").get_by_role("button", name="From the history").click()
    page.locator("#chooser .card button").first.click()
    page.locator("#interpolate-form [name=count]").fill("3")
    page.locator("#interpolate-form").get_by_role("button", name="Interpolate").click()
    expect(page.get_by_label("Path: share")).to_be_visible()
    page.get_by_role("radio", name="Vary").check()
    page.locator("#vary-form [name=n]").fill("2")
    page.locator("#vary-form").get_by_role("button", name="Vary").click()
    expect(page.locator("#edit-results .card")).to_have_count(2)


def test_look(page, address):
    make(page, "a cat", 7)
    made(page)
    page.locator("#history .card button").first.click()
    page.locator("#viewer").get_by_role("button", name="Look").click()
    page.get_by_label("Labels to choose from").fill("a rocket, a cat")
    page.locator("#look-form").get_by_role("button", name="Look").click()
    layer = page.locator(".overlay .map")
    expect(layer).to_be_visible()
    page.get_by_label("Opacity of the map").fill("25")
    assert layer.evaluate("(map) => map.style.opacity") == "0.25"
    page.get_by_label("Map", exact=True).select_option("Typicality")
    expect(page.locator(".scale")).to_contain_text("4 standard deviations")
    expect(page.locator(".finding .bar").first).to_contain_text("a cat")
    expect(page.get_by_alt_text("Its noise")).to_be_visible()
    expect(page.locator(".finding", has_text="Certificate")).to_contain_text("largest error")
    jobs = page.request.get("/api/jobs").json()["jobs"]
    score = next(job for job in jobs if job["kind"] == "score")
    nll = page.request.get(f"/api/jobs/{score['id']}").json()["result"]["nll"]
    expect(page.locator(".finding", has=page.get_by_role("heading", name="Likelihood")).locator(".big b")).to_have_text(
        f"{nll:.4g}"
    )


def test_other_kinds_of_models(page):
    page.locator("#model").select_option("labels")
    form = page.locator("#make-form")
    expect(form.locator("[name=prompt]")).to_be_hidden()
    form.locator("[name=label]").select_option("2")
    form.get_by_role("button", name="Make").click()
    made(page)
    page.locator("#model").select_option("movies")
    make(page, "waves", 1, frames=5)
    expect(page.locator(".place.finished .growing img")).to_have_attribute("src", re.compile(r"/api/gallery/.*\.webp"))
    assert page.locator(".place .steps img").count() > 1


def jobs_of(page: Any, kind: str) -> list[dict[str, Any]]:
    return [job for job in page.request.get("/api/jobs").json()["jobs"] if job["kind"] == kind]


def test_a_student_previews_what_is_typed(page):
    quick = page.get_by_label("Preview while typing")
    expect(quick).to_have_value("student")  # the embedded model's own
    page.locator("#model").select_option("movies")
    expect(quick).to_be_hidden()
    page.locator("#model").select_option("pictures")
    expect(quick).to_have_value("quick-one")
    prompt, preview = page.locator("#make-form [name=prompt]"), page.locator("#stage .quick img")
    known = len(page.request.get("/api/gallery").json()["items"])
    with page.expect_request("**/api/generate") as sent:
        prompt.press_sequentially("a cat", delay=20)  # one for all keys
    asked = sent.value.post_data_json
    assert asked["prompt"] == "a cat" and asked["student"] == "quick-one" and asked["keep"] is False
    expect(preview).to_have_attribute("src", re.compile("^data:image/png"))
    assert len(jobs_of(page, "preview")) == 1
    # The next key ends the one that is under way, and what comes is of the same noise.
    held: list[Any] = []
    page.route("**/api/generate", lambda route: held.append(route))
    prompt.press("s")
    while not held:
        page.wait_for_timeout(20)
    page.unroute("**/api/generate")
    with page.expect_event("requestfailed") as gone:
        prompt.press("!")
    assert gone.value.post_data_json["prompt"] == "a cats"
    expect(preview).to_have_count(1)
    with page.expect_request("**/api/generate?mode=background") as made_of:
        page.locator("#make-form").get_by_role("button", name="Make").click()
    exact = made_of.value.post_data_json
    assert exact["seed"] == asked["seed"] and exact["prompt"] == "a cats!" and "student" not in exact
    made(page)
    expect(preview).to_have_count(0)
    expect(page.locator(".place.finished figcaption")).to_have_text(f"seed {asked['seed']}")
    assert len(page.request.get("/api/gallery").json()["items"]) == known + 1
    # Another one has a seed of its own, and without previews there are none.
    with page.expect_request("**/api/generate") as sent:
        prompt.press("?")
    assert sent.value.post_data_json["seed"] != asked["seed"]
    expect(preview).to_have_count(1)
    quick.select_option("none")
    before = len(jobs_of(page, "preview"))
    prompt.press("x")
    page.wait_for_timeout(800)
    assert len(jobs_of(page, "preview")) == before


def test_what_is_made_can_be_enlarged(page):
    page.locator("#model").select_option("pictures")
    page.get_by_label("Enlarge").select_option("4 times")
    page.get_by_label("Preview while typing").select_option("none")
    make(page, "a dog", 5)
    made(page)
    newest = page.request.get("/api/gallery").json()["items"][0]
    assert (newest["width"], newest["height"]) == (32, 32)
    page.locator("#history .card button").first.click()
    expect(page.locator("#viewer")).to_contain_text("4 times by x4.pth")
    page.locator("#viewer").get_by_role("button", name="Use its settings").click()
    expect(page.get_by_label("Enlarge")).to_have_value("4")


def test_screenshots_at_three_widths(page, tmp_path):
    """Nothing is wider than the screen, everything has a name; and what it looks like."""
    shots = {}
    for prompt, seed in {"a slice of pizza": 7, "a cat": 3, "a red heart": 1, "a tulip": 4}.items():
        make(page, prompt, seed)
        expect(page.locator("#history .card").first).to_contain_text(f"{prompt}seed {seed}")
    make(page, "a slice of pizza", 7, n=4)
    made(page, 4)
    for name, width in WIDTHS.items():
        page.emulate_media(color_scheme="dark" if name == "edit" else "light")
        page.set_viewport_size({"width": width, "height": HEIGHT})
        if name != "make":
            prepare = {"edit": edit_something, "look": look_at_something}[name]
            prepare(page)
        for view in WIDTHS:
            page.get_by_role("tab", name=view).click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (view, width)
            assert page.evaluate(UNNAMED) == []
        page.get_by_role("tab", name=name).click()
        page.evaluate("document.activeElement.blur()")
        if name == "look":
            page.locator("#findings").evaluate("(findings) => findings.scrollIntoView()")
        page.wait_for_load_state("networkidle")
        expect(page.locator("#now")).to_have_text("Idle")
        shots[name] = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    gap = 24
    sheet = Image.new("RGB", (sum(WIDTHS.values()) + 4 * gap, HEIGHT + 2 * gap), (120, 120, 135))
    place = gap
    for name, width in WIDTHS.items():
        sheet.paste(shots[name], (place, gap))
        place += width + gap
    kept = Path(os.environ.get("STUDIO_PNG") or tmp_path / "studio.png")
    sheet.quantize(256, dither=Image.Dither.NONE).save(kept, optimize=True)
    assert Image.open(ROOT / "docs/studio.png").size == Image.open(kept).size


def edit_something(page: Any) -> None:
    page.get_by_role("tab", name="Make").click()
    edit_newest(page)
    page.get_by_role("radio", name="Re-prompt").check()
    page.get_by_label("What it shall show").fill("hamburger")
    page.locator("#reprompt-form").get_by_role("button", name="Re-prompt").click()
    expect(page.locator(".path .steps img")).to_have_count(5)
    page.get_by_label("Path: strength").fill("3")
    page.get_by_role("radio", name="Inpaint").check()
    box = page.locator("#easel canvas").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=4)
    page.mouse.up()


def look_at_something(page: Any) -> None:
    page.get_by_role("tab", name="Make").click()
    page.locator("#history .card button").first.click()
    page.locator("#viewer").get_by_role("button", name="Look").click()
    page.get_by_label("Labels to choose from").fill("slice of pizza, hamburger, rocket")
    page.locator("#look-form").get_by_role("button", name="Look").click()
    expect(page.locator(".overlay .map")).to_be_visible()
    expect(page.get_by_alt_text("Its noise")).to_be_visible()

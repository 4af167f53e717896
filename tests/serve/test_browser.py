"""The explorer in a real browser: found, read and compared with the keyboard alone; screenshots are kept."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.engine.command import called
from tests.serve.test_command import served
from tests.store.examples import ExampleRun

pytestmark = pytest.mark.slow

SHOTS = Path(__file__).resolve().parents[1] / "screenshots"
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--window-size=1300,900",
    ),
)


def browser(profile: Path, *flags: str) -> webdriver.Chrome:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={profile}", *flags):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))


@pytest.fixture(scope="module")
def address(example: ExampleRun) -> Iterator[str]:
    with served(example.out, "--sql") as (_, found):
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    opened = browser(tmp_path_factory.mktemp("profile"))
    try:
        SHOTS.mkdir(exist_ok=True)
        yield opened
    finally:
        opened.quit()


def press(page: webdriver.Chrome, *keys: str) -> None:
    """Keys to whatever has the focus."""
    webdriver.ActionChains(page).send_keys(*keys).perform()


def until(page: webdriver.Chrome, is_there: Callable[[webdriver.Chrome], bool]) -> None:
    WebDriverWait(page, 10).until(is_there)


def focus_by_tab(page: webdriver.Chrome, selector: str) -> str:
    """Tab until something that the selector means has the focus; its text."""
    for _ in range(120):
        press(page, Keys.TAB)
        active = page.switch_to.active_element
        if page.execute_script("return arguments[0].matches(arguments[1])", active, selector):
            return active.text
    raise AssertionError(f"Tab never reaches {selector} on {page.current_url}")


def follow(page: webdriver.Chrome, selector: str, path: str) -> None:
    focus_by_tab(page, selector)
    press(page, Keys.ENTER)
    until(page, lambda page: path in page.current_url)


def test_search_to_token_to_neuron_to_prompt_to_compare_by_keyboard(page: webdriver.Chrome, address: str):
    page.get(address)
    press(page, Keys.TAB)
    assert page.switch_to.active_element.text == "Skip to content"
    press(page, "/", "paris", Keys.ENTER)
    until(page, lambda page: "/search?q=paris" in page.current_url)
    page.save_screenshot(SHOTS / "search.png")
    follow(page, "main td a.t[href$='%20Paris']", "/token?text=%20Paris")
    assert page.find_element("css selector", "h1").text == "Token ␣Paris"
    page.save_screenshot(SHOTS / "token.png")
    follow(page, "main td a.n", "/neuron/")
    here = page.current_url
    page.save_screenshot(SHOTS / "neuron.png")
    arrow = Keys.ARROW_RIGHT if page.find_elements("css selector", ".beside [rel=next]") else Keys.ARROW_LEFT
    press(page, arrow)
    until(page, lambda page: page.current_url != here)
    follow(page, ".jumps a[href='#prompts']", "#prompts")
    follow(page, "#prompts td a[href^='/prompt/']", "/prompt/")
    page.save_screenshot(SHOTS / "prompt.png")
    one = int(page.current_url.rpartition("/")[2])
    press(page, "c", "4" if one != 4 else "5", Keys.ENTER)
    until(page, lambda page: "/compare?one=" in page.current_url)
    assert "not kept, ≤" in page.find_element("css selector", "main").text
    page.save_screenshot(SHOTS / "compare.png")
    assert page.get_log("browser") == []


def test_a_heatmap_is_one_stop_and_arrows_lead_through_it(page: webdriver.Chrome, address: str):
    page.get(f"{address}/prompt/1?module=mlp.up")
    focus_by_tab(page, ".heat td")
    first = page.switch_to.active_element.find_element("css selector", ".more")
    assert first.is_displayed()
    assert first.text.startswith("layer 2, position 0")
    press(page, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert not first.is_displayed()
    second = page.switch_to.active_element.find_element("css selector", ".more")
    assert second.text.startswith("layer 1, position 1")
    page.save_screenshot(SHOTS / "heatmap-focus.png")
    press(page, Keys.TAB)
    assert not page.execute_script("return document.activeElement.matches('.heat td')")
    assert page.get_log("browser") == []


def test_no_page_complains_or_overflows(page: webdriver.Chrome, address: str):
    pages = {
        "run": "/",
        "layers": "/layers",
        "about": "/about",
        "sql": "/sql?q=SELECT+1",
        "none": "/search?q=%00",
    }
    for name, path in pages.items():
        page.get(address + path)
        page.save_screenshot(SHOTS / f"{name}.png")
        width = page.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert width <= 0, name
    assert page.get_log("browser") == []


def test_the_explorer_is_dark_where_the_system_is_and_works_without_script(address: str, tmp_path: Path):
    flags = ("--blink-settings=preferredColorScheme=0,scriptEnabled=false", "--window-size=600,900")
    opened = browser(tmp_path, *flags)
    try:
        opened.get(f"{address}/prompt/1")
        opened.save_screenshot(SHOTS / "dark-narrow.png")
        colour = opened.find_element("css selector", "body").value_of_css_property("color")
        assert int(colour.split("(")[1].split(",")[0]) > 200
        assert not opened.find_elements("css selector", ".code button")
        assert len(opened.find_elements("css selector", ".heat td[tabindex='0']")) > 3
    finally:
        opened.quit()


LOOKS = """
const shown = (element) => {
  const style = getComputedStyle(element);
  return [element.tagName, element.textContent, style.color, style.backgroundColor, style.visibility, style.opacity];
};
return [...arguments[0].querySelectorAll("th, td, td > bdi, td > a, td > .t")].map(shown);
"""
"""What a reader sees of a row: each cell's words, with their colour and the one behind them."""

EVERY_STEP = """
document.querySelectorAll(".heat td[tabindex]:not(.zero)").forEach((cell, n) => (cell.className = `h${n % 10}`));
"""
"""Cells of all the colours that there are, as the norms of a random run are much alike."""


def point_at(page: webdriver.Chrome, element: WebElement) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", element)
    webdriver.ActionChains(page).move_to_element(element).perform()
    until(page, lambda page: page.execute_script("return arguments[0].matches(':hover')", element))


@pytest.fixture(scope="module")
def exported(example: ExampleRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of prompt 1 as a file of its own."""
    path = tmp_path_factory.mktemp("exported") / "prompt.html"
    assert called("export-html", example.out, "--prompt", 1, "--to", path).status == 0
    return path.as_uri()


@pytest.fixture(params=["light", "dark"])
def coloured(page: webdriver.Chrome, request: pytest.FixtureRequest) -> Iterator[webdriver.Chrome]:
    def prefer(scheme: str) -> None:
        wish = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", wish)

    prefer(request.param)
    yield page
    prefer("")


@pytest.mark.parametrize("of", ["serve", "export-html"])
def test_a_row_of_a_heatmap_looks_the_same_under_the_pointer(
    of: Literal["serve", "export-html"], coloured: webdriver.Chrome, address: str, exported: str
):
    page = coloured
    page.get(f"{address}/prompt/1" if of == "serve" else exported)
    page.execute_script(EVERY_STEP)
    for row in page.find_elements("css selector", ".heat tbody tr"):
        point_at(page, page.find_element("css selector", "h1"))
        before = page.execute_script(LOOKS, row)
        for cell in row.find_elements("css selector", "td[tabindex]"):
            point_at(page, cell)
            assert page.execute_script(LOOKS, row) == before
            more = cell.find_element("css selector", ".more")
            assert more.is_displayed()
            assert more.text.startswith("layer ")
            assert more.value_of_css_property("color") != more.value_of_css_property("background-color")
        for shown in before:
            assert_is_visible(shown)


def assert_is_visible(shown: list[Any]) -> None:
    tag, text, colour, background, visibility, opacity = shown
    assert (visibility, opacity) == ("visible", "1"), text
    if tag == "TD" and text:
        assert colour != background, text


@pytest.mark.parametrize("of", ["serve", "export-html"])
def test_words_and_links_of_other_tables_stay_under_the_pointer(
    of: Literal["serve", "export-html"], coloured: webdriver.Chrome, address: str, exported: str
):
    page = coloured
    page.get(f"{address}/prompt/1" if of == "serve" else exported)
    rows = page.find_elements("css selector", "table:not(.heat) tbody tr")
    assert rows
    for row in rows[:3]:
        point_at(page, page.find_element("css selector", "h1"))
        before = page.execute_script(LOOKS, row)
        for cell in row.find_elements("css selector", "td"):
            point_at(page, cell)
            under = page.execute_script(LOOKS, row)
            assert [shown[:2] for shown in under] == [shown[:2] for shown in before]
            for shown in under:
                assert_is_visible(shown)

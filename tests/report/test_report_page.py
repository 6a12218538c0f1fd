"""The page as a file: one piece, strict about what may run, and no text of others that is anything but data."""

import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from report_documents import made_up_explorer, made_up_report

from consistency_lens.report.page import LONGEST, SCRIPTS, embedded_json, hash_of, page_file, render_page

HOSTILE = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028\u202e</textarea>\ud83d🐶"
OWN = [name for name in SCRIPTS if not name.startswith("vendor/")]


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.texts.append((tag, ""))

    def handle_endtag(self, tag):
        self.texts.append(("", ""))

    def handle_data(self, data):
        if self.texts:
            self.texts[-1] = (self.texts[-1][0], self.texts[-1][1] + data)

    def text(self, tag):
        return [text for of, text in self.texts if of == tag]

    @property
    def data(self):
        return json.loads(self.text("script")[0])

    @property
    def policy(self):
        content = next(of["content"] for _, of in self.elements if of.get("http-equiv") == "Content-Security-Policy")
        return dict(part.split(" ", 1) for part in content.split("; "))


@pytest.fixture(scope="module")
def html():
    return render_page(made_up_report(made_up_explorer()))


def test_holds_its_document(html):
    assert Page(html).data == json.loads(json.dumps(made_up_report(made_up_explorer())))


def test_asks_for_nothing(html):
    page = Page(html)
    assert {"iframe", "img", "object", "embed", "form"}.isdisjoint(tag for tag, _ in page.elements)
    assert not any("src" in attributes for _, attributes in page.elements)
    assert [of["href"] for tag, of in page.elements if tag == "link"] == ["data:,"]
    assert "url(" not in "".join(page.text("style")) and "@import" not in "".join(page.text("style"))


def test_the_policy_knows_every_script_and_style_and_nothing_else(html):
    page = Page(html)
    _, *scripts = page.text("script")
    assert page.policy["script-src"].split() == [hash_of(script) for script in scripts]
    assert hash_of(page.text("style")[0]) in page.policy["style-src"].split()
    assert page.policy["default-src"] == "'none'" and "connect-src" not in page.policy
    assert "unsafe" not in " ".join(page.policy.values())
    assert not any(name.startswith("on") or name == "style" for _, of in page.elements for name in of)


def test_text_of_others_stays_data():
    explorer = made_up_explorer(texts=1, tokens=4)
    explorer["words"][0] = explorer["texts"][0]["title"] = HOSTILE
    explorer["texts"][0]["explanations"][0] = [HOSTILE, HOSTILE, HOSTILE]
    html = render_page(made_up_report(explorer, title=HOSTILE, notes=[HOSTILE], provenance=[["run", HOSTILE]]))
    plain = render_page(made_up_report(made_up_explorer(texts=1, tokens=4)))
    assert [tag for tag, _ in Page(html).elements] == [tag for tag, _ in Page(plain).elements]
    assert "alert(1)</script>" not in html and "<img" not in html
    assert Page(html).data["explorer"]["words"][0] == HOSTILE
    html.encode()  # half a character would be an error


def test_data_is_ascii_without_markup():
    text = embedded_json({"a": HOSTILE, HOSTILE: [float("nan"), float("inf"), 1.5, None, True]})
    assert text.isascii() and not set("<>&") & set(text)
    assert list(json.loads(text).values()) == [HOSTILE, [None, None, 1.5, None, True]]


def test_long_texts_are_cut():
    assert json.loads(embedded_json(["x" * 1_000_000])) == ["x" * LONGEST + "…"]


def test_a_server_may_add_a_script_that_connects():
    page = Page(render_page(made_up_report(), scripts=["ask();"], connects=True))
    assert page.text("script")[-1] == "ask();" and hash_of("ask();") in page.policy["script-src"]
    assert page.policy["connect-src"] == "'self'"
    with pytest.raises(ValueError, match="a script holds"):
        render_page(made_up_report(), scripts=["'</script>'"])


@pytest.mark.parametrize("name", OWN)
def test_no_script_makes_markup_of_text(name):
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function|DOMParser|fetch\(|XMLHttp|\.src\b",
        page_file(name),
    )


def test_the_libraries_are_those_that_the_notice_names():
    notice = page_file("vendor/NOTICE.txt")
    for name in SCRIPTS[:2]:
        digest = hashlib.sha256(page_file(name).encode()).hexdigest()
        assert f"{digest}  {name.removeprefix('vendor/')}" in notice


def test_ten_thousand_tokens_stay_below_five_megabytes():
    assert len(render_page(made_up_report(made_up_explorer(texts=40, tokens=250))).encode()) < 5_000_000

"""What the site has beyond MkDocs.

The repository's other pages, links from names to the reference, and the proof that a page fetches
nothing from elsewhere. Pages are written so that they read on a code host as well: links are
relative to the file, and a public name stands in single backticks.
"""

import os
import re
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "experiments/**/*.md")
"""Pages outside docs/; on the site they keep their place in the repository."""

LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")
NAME = re.compile(r"(?<![`\w\[])`(fjax\.\w[\w.]*)`(?![`\]])")
STYLE = re.compile(r"(?:url\(|@import)[\s\"'(]*(?:\w+:)?//[^\s\"')]+")
FENCE = re.compile(r"^(?:```.*?^```|    .*?$)", re.MULTILINE | re.DOTALL)


def on_files(files, config):
    """Adds the pages from outside docs/."""
    from mkdocs.structure.files import File

    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Leads links to where the site has their targets, and names to the reference."""
    source = Path(page.file.abs_src_path)

    def moved(match):
        return match[1] + new_place(match[2], source=source, uri=page.file.src_uri)

    # The changelog is of names that may have gone.
    named = str if page.file.src_uri == "CHANGELOG.md" else lambda t: NAME.sub(r"[`\1`][\1]", t)
    return outside_code(lambda text: named(LINK.sub(moved, text)), markdown)


def new_place(link: str, *, source: Path, uri: str) -> str:
    """A link relative to a file of the repository, as one relative to its page on the site."""
    target = Path(os.path.normpath(source.parent / link))
    if not target.is_relative_to(ROOT):
        return link  # MkDocs reports it
    target = target.relative_to(ROOT)
    on_site = target.relative_to("docs") if target.parts[0] == "docs" else target
    return os.path.relpath(on_site, Path(uri).parent)


def outside_code(change, markdown: str) -> str:
    """The text with all but its blocks of code changed."""
    parts, end = [], 0
    for block in FENCE.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])


def on_post_page(output, page, **_):
    """Refuses a page that would fetch something from elsewhere."""
    found = fetched(output)
    if found:
        from mkdocs.exceptions import PluginError

        raise PluginError(f"{page.file.src_uri} fetches {', '.join(found)}: keep a copy in docs/.")
    return output


def fetched(html: str) -> list[str]:
    """Addresses elsewhere of all that a browser loads with a page; links to follow are none."""
    reader = _Loads()
    reader.feed(html)
    return reader.found


class _Loads(HTMLParser):
    """Notes down what elements and styles load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.found += STYLE.findall(values.get("style") or "")
        if tag == "a" or (tag == "link" and values.get("rel") in ("canonical", "next", "prev")):
            return
        loaded = (values.get(name) or "" for name in ("src", "href", "data", "srcset", "poster"))
        self.found += filter(re.compile(r"\s*(\w+:)?//").match, loaded)

    def handle_data(self, data):
        if self.cdata_elem == "style":
            self.found += STYLE.findall(data)

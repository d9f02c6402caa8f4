"""Shows notebooks on the site: an extension of Markdown for Zensical.

A page that is one link to a notebook, `[first-steps.ipynb](first-steps.ipynb)`, becomes the
notebook's text, code and stored outputs.  The notebook stays the only source.
"""

import html
import json
import re
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from markdown.preprocessors import Preprocessor


LINK = re.compile(r"\[(?P<name>[\w-]+\.ipynb)\]\((?P=name)\)")


class Notebooks(Extension):
    """Replaces pages that are one link to a notebook of `folder`."""

    def __init__(self, **options: Any) -> None:
        self.config = {"folder": ["docs/notebooks", "the folder of the notebooks"]}
        super().__init__(**options)

    def extendMarkdown(self, md: Markdown) -> None:
        """Registers the replacement, after white space is mended and before fences are read."""
        folder = Path(self.getConfig("folder"))
        md.preprocessors.register(_Shown(md, folder), "notebooks", priority=28)


class _Shown(Preprocessor):
    def __init__(self, md: Markdown, folder: Path) -> None:
        super().__init__(md)
        self.folder = folder

    def run(self, lines: list[str]) -> list[str]:
        found = LINK.fullmatch("\n".join(lines).strip())
        if not found:
            return lines
        notebook = json.loads((self.folder / found["name"]).read_text(encoding="utf-8"))
        return "\n\n".join(self._parts(notebook, found["name"])).splitlines()

    def _parts(self, notebook: dict[str, Any], name: str) -> list[str]:
        parts, heading = [], name
        for cell in notebook["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                heading = (re.findall(r"^#+ (.+)$", source, re.MULTILINE) or [heading])[-1]
                parts.append(re.sub(r"\(([\w-]+)\.ipynb\)", r"(\1.md)", source))
            else:
                parts.append(f"```python\n{source}\n```")
                parts += [self._output(output, heading) for output in cell["outputs"]]
        return parts

    def _output(self, output: dict[str, Any], heading: str) -> str:
        data = {kind: "".join(value) for kind, value in output.get("data", {}).items()}
        data |= {"text/plain": "".join(output["text"])} if "text" in output else {}
        if "image/png" in data:
            png = data["image/png"].replace("\n", "")
            alt = html.escape(f"Output: {heading}", quote=True)
            shown = f'<p><img alt="{alt}" src="data:image/png;base64,{png}"></p>'
            return self.md.htmlStash.store(shown)
        if "text/html" in data and 'class="dataframe"' not in data["text/html"]:
            return self.md.htmlStash.store(data["text/html"])
        text = html.escape(data["text/plain"].rstrip())
        return self.md.htmlStash.store(f'<pre class="output"><code>{text}</code></pre>')


def makeExtension(**options: Any) -> Notebooks:
    """Returns the extension; Markdown calls it by this name."""
    return Notebooks(**options)

"""Writes reports again from the results in a folder, without a model."""

import html
import re
from pathlib import Path

from hooked_vlm.errors import DataError
from hooked_vlm.report.folder import RECORD, gathered, record_in, write_gathered
from hooked_vlm.report.index import INDEX, write_index
from hooked_vlm.report.page import PAGE


def rebuild(out: Path) -> list[Path]:
    """Writes the reports in a folder again; returns the pages' paths, an index last.

    `out` is the folder of one run, or one with a folder for each of several models.

    Raises `DataError` where there is no finished run.
    """
    if (out / RECORD).exists():
        return [write_gathered(out, record_in(out))]
    folders = folders_of_runs(out)
    pages, reports = [], {}
    for folder in folders:
        record = record_in(folder)
        found = gathered(folder, record)
        known = {result.key: result for result in found.results}
        pages.append(write_gathered(folder, record, known))
        reports[folder.name] = (found.results, record)
    return [*pages, write_index(reports, out, title=_title_in(out / INDEX))]


def folders_of_runs(out: Path) -> list[Path]:
    """Returns the folders of runs in a folder, one for each model; raises `DataError` for none.

    They are in the order of the index page, where there is one.
    """
    page = html.unescape(_text_of(out / INDEX))
    listed = list(dict.fromkeys(re.findall(rf'href="([^"#]+)/{PAGE}"', page)))
    found = sorted(path.parent for path in out.glob(f"*/{RECORD}"))
    found.sort(key=lambda path: listed.index(path.name) if path.name in listed else len(listed))
    if not found:
        raise DataError(
            f"There is no finished run in '{out}'. Give the --out of hooked-vlm run, demo or "
            "reproduce."
        )
    return found


def _title_in(page: Path) -> str:
    """Returns the title of an index page that is there, else a general one."""
    found = re.search("<title>(.*?)</title>", _text_of(page))
    return html.unescape(found[1]) if found else "Several models, side by side"


def _text_of(page: Path) -> str:
    return page.read_text() if page.exists() else ""

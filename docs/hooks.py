# Copyright (c) revcol_mm authors. Licensed under the Apache License 2.0.
"""What mkdocs calls while it builds the site: pages link to files of the checkout that lie outside of docs/.

Such links work where the pages are read in the checkout. The site gets copies of the files, under ``files/``.
"""
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(?<=\]\()\.\./([^)#\s]+)')
ROLE = re.compile(r':(?:class|func|meth|mod|data|attr):<code>(~?)([^<]+)</code>')


def on_files(files: Files, config) -> Files:
    """Adds the files that the pages link to."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(Path(page.abs_src_path).read_text(encoding='utf-8')):
            path = ROOT / target
            if not path.is_file():
                raise PluginError(f'{page.src_uri} links to ../{target}, which must be a file of the checkout, but is not')
            if files.get_file_from_path(f'files/{target}') is None:
                files.append(File.generated(config, f'files/{target}', abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Leads the links to the copies."""
    up = posixpath.relpath('.', posixpath.dirname(page.file.src_uri) or '.')
    return LINK.sub(lambda match: posixpath.join(up, 'files', match[1]), markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """Docstrings name classes as Sphinx does, :class:`~package.module.Name`: only the name is left."""
    return ROLE.sub(lambda match: f'<code>{match[2].rpartition(".")[2] if match[1] else match[2]}</code>', html)

"""Sphinx's HTML builder with its work dealt out evenly: what stands on a page does not change.

Sphinx reads pages on several processes but deals them out by the alphabet, which puts the whole API into one pile,
and it resolves links, indexes words and highlights source code on one process alone. Here every process takes an
equally heavy pile of pages from its file to the tree of its words, and later from that tree to HTML. A process lives
as long as its pile, so none of them collects garbage. Where processes cannot be forked, Sphinx's own way is taken.
"""

import functools
import gc
import heapq
import inspect
import logging
import pickle
import types
from pathlib import Path

from pydata_sphinx_theme import toctree
from sphinx import addnodes
from sphinx.builders.html import StandaloneHTMLBuilder
from sphinx.ext import viewcode
from sphinx.ext.autodoc import preserve_defaults, type_comment
from sphinx.util.build_phase import BuildPhase
from sphinx.util.parallel import ParallelTasks

CODE = "_modules/"  # where the pages of source code are


class SiteBuilder(StandaloneHTMLBuilder):
    """Builds the same pages as `html`, under the same name."""

    _short_tocs: dict | None = None

    def _read_parallel(self, docnames, nproc):
        for docname in docnames:
            self.events.emit("env-purge-doc", self.env, docname)
            self.env.clear_doc(docname)

        def read(pile):
            self.env.app = self.app
            for docname in pile:
                self.read_doc(docname, _cache=False)
            return pickle.dumps(self.env, pickle.HIGHEST_PROTOCOL)

        weights = {name: self._weight(name, entry=16, kilobyte=0.15) for name in docnames}
        for pile, read_there in dealt(weights, nproc, read):
            self.env.merge_info_from(pile, pickle.loads(read_there), self.app)

    def _write_parallel(self, docnames, nproc):
        index = self.indexer
        index.lang.stem = functools.cache(index.lang.stem)

        def write(pile):
            for docname in pile:
                self.app.phase = BuildPhase.RESOLVING
                doctree = self.env.get_and_resolve_doctree(docname, self)
                self.app.phase = BuildPhase.WRITING
                self.write_doc_serialized(docname, doctree)
                self.write_doc(docname, doctree)
            return self.images, {name: getattr(index, name) for name in (*BY_PAGE, *BY_WORD)}

        weights = {name: self._weight(name, entry=8, kilobyte=0.3) for name in docnames}
        for _, (images, part) in dealt(weights, self.app.parallel, write):
            self.images.update(images)
            for name in BY_PAGE:
                getattr(index, name).update(part[name])
            for name in BY_WORD:
                for word, pages in part[name].items():
                    getattr(index, name).setdefault(word, set()).update(pages)

    def _weight(self, docname, entry, kilobyte):
        """About how many milliseconds a page takes: an entry of the API costs as much as a section of prose."""
        path = Path(self.env.doc2path(docname))
        entries = 0 if path.suffix == ".ipynb" else path.read_text(encoding="utf-8").count("\n.. auto")
        return 20 + entry * entries + kilobyte * path.stat().st_size / 1000

    def gen_pages_from_extensions(self):
        """Highlight source code on all processes; the list of it, and pages of others, come from one of them."""
        modules = getattr(self.env, "_viewcode_modules", {})
        weights = {name: 5_000 + len(entry[0]) for name, entry in modules.items() if entry}
        if not self.parallel_ok or not weights:
            return super().gen_pages_from_extensions()

        def write(pile):
            viewcode.should_generate_module_page = lambda app, name: name in pile
            for pages in self.events.emit("html-collect-pages"):
                for name, context, template in pages:
                    if (name.startswith(CODE) and name != f"{CODE}index") or first in pile:
                        self.handle_page(name, context, template)

        first = min(weights)
        dealt(weights, self.app.parallel, write)

    def _get_local_toctree(self, docname, collapse=True, **keywords):
        """Resolve a navigation of titles from the titles, without copying every section of the book first."""
        if not keywords.get("titles_only") or collapse:
            return super()._get_local_toctree(docname, collapse=collapse, **keywords)
        if self._short_tocs is None:
            self._short_tocs = {name: titles_of(toc) for name, toc in self.env.tocs.items()}
        whole, self.env.tocs = self.env.tocs, self._short_tocs
        try:
            return super()._get_local_toctree(docname, collapse=collapse, **keywords)
        finally:
            self.env.tocs = whole


BY_PAGE = ("_titles", "_filenames", "_all_titles", "_index_entries")  # of the search index
BY_WORD = ("_mapping", "_title_mapping")


def titles_of(toc):
    """The contents of a page without its sections: its title and the pages below it."""
    short = toc.deepcopy()
    for entry in short.children:
        if len(entry) > 1:
            below = list(entry.findall(addnodes.toctree))
            if below:
                entry[1][:] = below
            else:
                entry.pop(1)
    return short


def piles(weights: dict[str, float], count: int) -> list[list[str]]:
    """Deal names into at most `count` piles of about the same weight: the heaviest first, each to the lightest pile."""
    heap = [(0, place, []) for place in range(min(count, len(weights)))]
    for name in sorted(weights, key=lambda name: (-weights[name], name)):
        weight, place, pile = heapq.heappop(heap)
        heapq.heappush(heap, (weight + weights[name], place, [*pile, name]))
    return [pile for _, _, pile in sorted(heap, key=lambda entry: entry[1])]


def dealt(weights, count, work):
    """Do `work` on each pile in a process of its own; return piles and results, always in the same order."""
    results = {}

    def alone(pile):
        gc.disable()
        return work(pile)

    gc.collect()
    gc.freeze()  # the processes share this memory as long as nobody touches it
    tasks = ParallelTasks(count)
    for pile in piles(weights, count):
        tasks.add_task(alone, pile, lambda pile, result: results.__setitem__(tuple(pile), result))
    tasks.join()
    return sorted(results.items())


def remembering(add_functions):
    """The theme's navigation as text, made once a page, and once for all pages of source code, where it is the same."""
    known = {}

    def add(app, pagename, templatename, context, doctree):
        add_functions(app, pagename, templatename, context, doctree)
        make = context["generate_toctree_html"]
        place = pagename.count("/") if pagename.startswith(CODE) else pagename  # links depend on the depth of the page

        def once(kind, **keywords):
            if kind != "sidebar":
                return make(kind, **keywords)
            key = place, tuple(sorted(keywords.items()))
            if key not in known:
                known[key] = str(make(kind, **keywords))
            return known[key]

        context["generate_toctree_html"] = once

    return add


def remember_navigation(app):
    """Put `remembering` around the theme's own function, in its place among the listeners."""
    listeners = app.events.listeners["html-page-context"]
    for place, listener in enumerate(listeners):
        if listener.handler is toctree.add_toctree_functions:
            listeners[place] = listener._replace(handler=remembering(listener.handler))


def spare(app, config):
    """Leave out what costs time on every entry or page and shows nowhere."""
    # This extension, which numbers sections when all pages are read, forgot to say that it may be read in parallel.
    if "sphinx_multitoc_numbering" in app.extensions:
        app.extensions["sphinx_multitoc_numbering"].parallel_read_safe = True
    # Our types are annotations, not comments.
    for listener in list(app.events.listeners.get("autodoc-before-process-signature", ())):
        if listener.handler is type_comment.update_annotations_using_type_comments:
            app.disconnect(listener.id)
    # Default values are shown as they are written: twice an entry its source is looked for in its file.
    preserve_defaults.inspect = types.SimpleNamespace(
        **{**vars(inspect), "getsource": functools.lru_cache(8)(inspect.getsource)}
    )
    if not app.verbosity:  # a message for every event, which nobody sees
        logging.getLogger("sphinx").setLevel(logging.INFO)


def setup(app):
    """Take the place of Sphinx's own builder."""
    app.connect("config-inited", spare)
    app.connect("builder-inited", remember_navigation)
    app.add_builder(SiteBuilder, override=True)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}

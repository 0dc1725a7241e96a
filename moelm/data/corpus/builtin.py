"""The builtin corpus: text of the standard library and of an allowlist of installed packages, labeled by domain.

Packages that are not installed are left out. The synthetic domains are generated in `moelm.data.corpus.synthetic`.
"""

import ast
import hashlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from itertools import islice
from pathlib import Path, PurePath
from typing import NamedTuple

from moelm.data.corpus.holdout import hold_out
from moelm.data.corpus.synthetic import GENERATOR_VERSION, SYNTHETIC_DOMAINS, synthetic_documents
from moelm.data.document import Document

CORPUS_VERSION = 2
"""Incremented whenever a rule in this file or in `moelm.data.corpus.holdout` changes the documents."""

SYNTHETIC_BYTES = 3_000_000
"""UTF-8 bytes of each synthetic domain."""

MIN_CHARS = 64
"""Minimum length of a document; shorter ones are empty `__init__.py` files and one-line docstrings."""

MAX_CHARS = 200_000
"""Longest document; the rest of a longer one is left out, so that no document is more than 0.5% of the training split."""

# A larger file is a generated table or an amalgamation, and would dominate its domain.
_MAX_FILE_BYTES = 400_000
# Code has 1 to 5 digits per hundred bytes; a file above this limit is a table of code points or numbers.
_MAX_DIGIT_SHARE = 0.12
# A module with a larger share of docstrings belongs to the documentation domain, any other to the code domain. So no
# text is in the corpus twice, and a held-out docstring is not in the training split as a part of its module.
_DOCS_SHARE = 0.2

# Tests are long and repetitive, vendored copies are duplicates, and the others are generated tables.
_TESTS = {"test", "tests", "testing", "_testing", "idle_test", "benchmarks"}
_COPIES = {"_vendor", "vendor", "vendored", "third_party", "_bundled", "site-packages", "dist-packages"}
_GENERATED = {"__pycache__", "_generated", "proto", "encodings"}
_INSTALLERS = {"pip", "setuptools", "ensurepip"}
_SKIPPED_FOLDERS = _TESTS | _COPIES | _GENERATED | _INSTALLERS
_SKIPPED_ENDINGS = ("_pb2.py", "_test.py", "_generated.py", "conftest.py")
_LICENSE_NAMES = ("LICEN", "COPYING", "NOTICE", "AUTHORS", "CITATION")


class _Package(NamedTuple):
    """The path prefixes that are read of one distribution."""

    distribution: str
    modules: tuple[str, ...]
    headers: tuple[str, ...] = ()


# Only some folders of large packages are read, so that no package dominates.
_SYMPY = (
    "sympy/calculus/", "sympy/combinatorics/", "sympy/core/", "sympy/functions/", "sympy/geometry/",
    "sympy/logic/", "sympy/ntheory/", "sympy/series/", "sympy/sets/", "sympy/solvers/", "sympy/stats/",
)  # fmt: skip
_TORCH = (
    "torch/autograd/", "torch/distributed/fsdp/", "torch/distributed/tensor/", "torch/distributions/",
    "torch/fft/", "torch/func/", "torch/linalg/", "torch/multiprocessing/", "torch/nn/", "torch/optim/",
    "torch/profiler/", "torch/special/", "torch/utils/data/",
)  # fmt: skip
_TORCH_HEADERS = (
    "torch/include/ATen/core/", "torch/include/c10/", "torch/include/pybind11/",
    "torch/include/torch/csrc/api/",
)  # fmt: skip
_PACKAGES = (
    _Package("anyio", ("anyio/",)),
    _Package("click", ("click/",)),
    _Package("datasets", ("datasets/",)),
    _Package("dill", ("dill/",)),
    _Package("fonttools", ("fontTools/misc/", "fontTools/pens/")),
    _Package("fsspec", ("fsspec/",)),
    _Package("httpx", ("httpx/",)),
    _Package("huggingface-hub", ("huggingface_hub/",)),
    _Package("jinja2", ("jinja2/",)),
    _Package("markdown-it-py", ("markdown_it/",)),
    _Package("matplotlib", ("matplotlib/", "mpl_toolkits/")),
    _Package("mpmath", ("mpmath/",)),
    _Package("networkx", ("networkx/",)),
    _Package("numpy", ("numpy/",), ("numpy/_core/include/",)),
    _Package("packaging", ("packaging/",)),
    _Package("pandas", ("pandas/core/", "pandas/plotting/", "pandas/tseries/")),
    _Package("pillow", ("PIL/",)),
    _Package("pyarrow", ("pyarrow/",), ("pyarrow/include/arrow/",)),
    _Package("pydantic", ("pydantic/",)),
    _Package("pygments", ("pygments/formatters/",)),
    _Package("pyparsing", ("pyparsing/",)),
    _Package("python-dateutil", ("dateutil/",)),
    _Package("pyyaml", ("yaml/",)),
    _Package("requests", ("requests/",)),
    _Package("rich", ("rich/",)),
    _Package("sympy", _SYMPY),
    _Package("tokenizers", ("tokenizers/",)),
    _Package("torch", _TORCH, _TORCH_HEADERS),
    _Package("tqdm", ("tqdm/",)),
    _Package("typer", ("typer/",)),
    _Package("typing-extensions", ("typing_extensions.py",)),
    _Package("urllib3", ("urllib3/",)),
    _Package("wandb", ("wandb/plot/", "wandb/sdk/data_types/", "wandb/sdk/lib/")),
    _Package("zstandard", ("zstandard/",)),
)


def split_corpus(val_fraction: float, split_seed: int, max_documents: int | None = None) -> Iterator[Document]:
    """The documents of the corpus, or the first ones, each with its split; see `moelm.data.corpus.holdout`."""
    documents = list(islice(builtin_documents(), max_documents))
    return hold_out(documents, val_fraction, split_seed, generated="synthetic-")


def builtin_documents() -> Iterator[Document]:
    """The documents of the corpus in a fixed order, alternating between its parts.

    Files that are missing, unreadable, not UTF-8, or tables by the rules above are left out, as are duplicates and
    texts of fewer than `MIN_CHARS` characters.
    """
    parts = [_stdlib_modules(), _topics(), _package_modules(), _package_texts(), _headers()]
    parts += [synthetic_documents(domain, SYNTHETIC_BYTES) for domain in SYNTHETIC_DOMAINS]
    seen: set[bytes] = set()
    for document in _alternate(parts):
        key = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if len(document.text) >= MIN_CHARS and key not in seen:
            seen.add(key)
            text = document.text[:MAX_CHARS]
            yield document._replace(text=text, left_out=len(document.text) - len(text))


def builtin_fingerprint() -> str:
    """A hash of everything the corpus on this machine depends on: Python, packages, rules."""
    versions = [f"{package.distribution} {_version(package.distribution)}" for package in _PACKAGES]
    own = f"corpus {CORPUS_VERSION}, generator {GENERATOR_VERSION}, {SYNTHETIC_BYTES} bytes"
    facts = [own, f"python {platform.python_version()} {sys.platform}", *versions]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _alternate(parts: Iterable[Iterator[Document]]) -> Iterator[Document]:
    remaining = list(parts)
    while remaining:
        for part in list(remaining):
            document = next(part, None)
            if document is None:
                remaining.remove(part)
            else:
                yield document


class _File(NamedTuple):
    path: Path
    name: str
    """Relative path, the same on every machine."""


def _stdlib_modules() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in _files_below(root, ".py", "stdlib"):
        # The build configuration, and the topics, which `_topics` yields one by one.
        if not file.path.name.startswith("_sysconfigdata") and file.path.parent.name != "pydoc_data":
            yield from _module_document(file, "stdlib")


def _topics() -> Iterator[Document]:
    """The language reference as shown by `help()`, without sections that a longer topic contains."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some systems package it separately
        return
    for name, text in sorted(topics.items()):
        body = text.partition("\n\n")[2].strip()
        if not any(body in other for other in topics.values() if len(other) > len(text)):
            yield Document(text, "stdlib-docs", f"stdlib/pydoc_data/topics.py, topic {name}")


def _package_modules() -> Iterator[Document]:
    for package in _PACKAGES:
        for file in _package_files(package.distribution, package.modules, (".py",)):
            yield from _module_document(file, "package")


def _module_document(file: _File, origin: str) -> Iterator[Document]:
    """A module as code, or its docstrings if they are a large part of it."""
    text = _read_text_file(file.path)
    if text is None:
        return
    min_docs_chars = _DOCS_SHARE * len(text)
    # Parsing takes most of the time; a module with few characters in triple quotes is code without parsing it.
    quoted = sum(map(len, text.split('"""')[1::2]))
    docs = _docstrings(text) if quoted >= min_docs_chars else []
    if sum(len(doc) for _, doc in docs) < min_docs_chars:
        yield Document(text, f"{origin}-code", file.name)
        return
    sections = [f"{name}\n\n{doc}" if name else doc for name, doc in docs]
    yield Document("\n\n\n".join(sections) + "\n", f"{origin}-docs", f"{file.name}, docstrings")


def _docstrings(source: str) -> list[tuple[str, str]]:
    """Qualified names and docstrings of a module in source order; none if it does not parse."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in packages' strings are not the user's problem.
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return list(_docstrings_below(tree, ""))


def _docstrings_below(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node)
    if doc:
        yield name, doc
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings_below(child, f"{name}.{child.name}".lstrip("."))


def _package_texts() -> Iterator[Document]:
    """Long descriptions, guides and licenses; of licenses that differ only in the copyright line, the first one."""
    licenses: set[str] = set()
    for package in _PACKAGES:
        for file in _package_files(package.distribution, ("",), ("", ".md", ".rst", ".txt")):
            text = _read_text_file(file.path) if _is_prose(file.path) else None
            if text is None:
                continue
            if file.path.name == "METADATA":
                text = text.partition("\n\n")[2]
            elif file.path.name.upper().startswith(_LICENSE_NAMES):
                terms = _license_terms(text)
                if terms in licenses:
                    continue
                licenses.add(terms)
            yield Document(text, "package-docs", file.name)


def _license_terms(license_text: str) -> str:
    lines = (line.strip() for line in license_text.splitlines())
    return "".join(line for line in lines if "copyright (c)" not in line.lower())


def _is_prose(path: Path) -> bool:
    if path.suffix in (".md", ".rst"):
        return True
    return path.name == "METADATA" or path.name.upper().startswith(_LICENSE_NAMES)


def _headers() -> Iterator[Document]:
    files = list(_files_below(Path(sysconfig.get_path("include")), ".h", "include"))
    for package in _PACKAGES:
        if package.headers:
            files += _package_files(package.distribution, package.headers, (".h", ".hpp", ".cuh"))
    for file in files:
        text = _read_text_file(file.path)
        if text is not None:
            yield Document(text, "headers", file.name)


def _files_below(root: Path, ending: str, name: str) -> list[_File]:
    below = (path.relative_to(root) for path in root.rglob(f"*{ending}"))
    files = [_File(root / path, f"{name}/{path.as_posix()}") for path in below if not _is_skipped(path)]
    return sorted(files, key=lambda file: file.name)


def _package_files(distribution: str, prefixes: tuple[str, ...], endings: tuple[str, ...]) -> list[_File]:
    """The matching files in a distribution's record; none if it is not installed."""
    try:
        listed = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return []
    wanted = (path for path in listed if path.suffix in endings and path.as_posix().startswith(prefixes))
    files = [_File(Path(str(path.locate())), path.as_posix()) for path in wanted if not _is_skipped(path)]
    return sorted(files, key=lambda file: file.name)


def _is_skipped(path: PurePath) -> bool:
    name = path.name
    if name.endswith(_SKIPPED_ENDINGS) or name.startswith("test_") or ".." in path.parts:
        return True
    return not _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])


def _read_text_file(path: Path) -> str | None:
    """The text of a file; None if it is unreadable, not UTF-8, too long or a table of numbers."""
    try:
        data = path.read_bytes()
        digits = len(data) - len(data.translate(None, b"0123456789"))
        if len(data) > _MAX_FILE_BYTES or digits > _MAX_DIGIT_SHARE * len(data):
            return None
        return data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None

"""The builtin corpus: text of what is installed, read file by file and labelled with its domain, offline.

The standard library and an allowlist of moelm's own dependencies are read, never a walk over site-packages; what
is not installed is left out, so the corpus is smaller there. The synthetic text is in `moelm.data.synthetic`.
"""

import ast
import hashlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePath
from typing import NamedTuple

from moelm.data.document import Document
from moelm.data.synthetic import GENERATOR_VERSION, SYNTHETIC_DOMAINS, synthetic_documents

CORPUS_VERSION = 1
"""Raised with every change of the rules in this file that changes the documents."""

SYNTHETIC_BYTES = 3_000_000
"""UTF-8 bytes of each synthetic domain."""

MIN_CHARS = 64
"""Shorter documents teach nothing: empty `__init__.py` files, one-line docstrings."""

# A longer file is a generated table or an amalgamation, and would be a large part of its domain on its own.
_MAX_FILE_BYTES = 400_000
# Ordinary code has 1 to 5 digits in a hundred bytes; above this a file is a table of code points or coefficients.
_MAX_DIGIT_SHARE = 0.12
# A module with more documentation than this serves the documentation domain, any other the code domain. So no
# text is in the corpus twice, and a held-out docstring was not seen in training as a part of its module.
_DOCS_SHARE = 0.2

# Tests are long and repetitive; copies of other projects and generated modules would be duplicates or tables.
_SKIPPED_FOLDERS = frozenset(
    "test tests testing _testing idle_test benchmarks _vendor vendor vendored third_party _bundled _generated "
    "__pycache__ site-packages dist-packages pip setuptools ensurepip encodings proto".split(" ")
)
_SKIPPED_ENDINGS = ("_pb2.py", "_test.py", "_generated.py", "conftest.py")
_LICENCES = ("LICEN", "COPYING", "NOTICE", "AUTHORS", "CITATION")


class _Package(NamedTuple):
    """What is read of one distribution: path prefixes below its install folder."""

    distribution: str
    modules: tuple[str, ...]
    headers: tuple[str, ...] = ()


# Large packages give only the folders that people read, so that no style of code dominates the others.
_PACKAGES = (
    _Package("anyio", ("anyio/",)),
    _Package("click", ("click/",)),
    _Package("datasets", ("datasets/",)),
    _Package("dill", ("dill/",)),
    _Package("filelock", ("filelock/",)),
    _Package("fonttools", ("fontTools/ttLib/", "fontTools/pens/", "fontTools/misc/")),
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
    _Package("pandas", ("pandas/core/", "pandas/io/", "pandas/plotting/", "pandas/tseries/")),
    _Package("pillow", ("PIL/",)),
    _Package("psutil", ("psutil/",)),
    _Package("pyarrow", ("pyarrow/",), ("pyarrow/include/arrow/",)),
    _Package("pydantic", ("pydantic/",)),
    _Package("pygments", ("pygments/formatters/", "pygments/lexers/python.py", "pygments/lexers/javascript.py")),
    _Package("pyparsing", ("pyparsing/",)),
    _Package("python-dateutil", ("dateutil/",)),
    _Package("pyyaml", ("yaml/",)),
    _Package("requests", ("requests/",)),
    _Package("rich", ("rich/",)),
    _Package(
        "sympy",
        tuple(
            f"sympy/{part}/"
            for part in "calculus combinatorics core functions geometry logic matrices ntheory series sets "
            "simplify solvers stats tensor vector".split(" ")
        ),
    ),
    _Package("tokenizers", ("tokenizers/",)),
    _Package(
        "torch",
        tuple(
            f"torch/{part}/"
            for part in "autograd cuda distributed/checkpoint distributed/fsdp distributed/tensor distributions "
            "fft func fx linalg multiprocessing nn optim profiler sparse special utils/data".split(" ")
        ),
        tuple(f"torch/include/{part}/" for part in "ATen/core c10 pybind11 torch/csrc/api torch/csrc/jit".split(" ")),
    ),
    _Package("tqdm", ("tqdm/",)),
    _Package("typer", ("typer/",)),
    _Package("typing-extensions", ("typing_extensions.py",)),
    _Package("urllib3", ("urllib3/",)),
    _Package("wandb", ("wandb/",)),
    _Package("zstandard", ("zstandard/",)),
)


def builtin_documents() -> Iterator[Document]:
    """Yields the corpus in a fixed order that takes turns among its parts, so that a beginning of it is mixed too.

    Files that are missing, unreadable, not UTF-8, or tables by the rules above are left out, and so are second
    copies of a text and texts of fewer than `MIN_CHARS` characters.
    """
    parts: list[Iterator[Document]] = [_stdlib_modules(), _topics(), _package_modules(), _package_texts(), _headers()]
    parts += [synthetic_documents(domain, SYNTHETIC_BYTES) for domain in SYNTHETIC_DOMAINS]
    seen: set[bytes] = set()
    for document in _take_turns(parts):
        key = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if len(document.text) >= MIN_CHARS and key not in seen:
            seen.add(key)
            yield document


def builtin_fingerprint() -> str:
    """A short name of the corpus on this machine: another Python, package or rule gives another name."""
    versions = [f"{package.distribution} {_version(package.distribution)}" for package in _PACKAGES]
    own = f"corpus {CORPUS_VERSION}, generator {GENERATOR_VERSION}, {SYNTHETIC_BYTES} bytes"
    facts = [own, f"python {platform.python_version()} {sys.platform}", *versions]
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "missing"


def _take_turns(parts: Iterable[Iterator[Document]]) -> Iterator[Document]:
    waiting = list(parts)
    while waiting:
        for part in list(waiting):
            document = next(part, None)
            if document is None:
                waiting.remove(part)
            else:
                yield document


class _File(NamedTuple):
    path: Path
    place: str
    """The name that is shown and sorted by: relative, hence the same on every machine."""


def _stdlib_modules() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in _files_below(root, ".py", "stdlib"):
        # The build's own configuration, and the topics, which `_topics` gives one by one.
        if not file.path.name.startswith("_sysconfigdata") and file.path.parent.name != "pydoc_data":
            yield from _module(file, "stdlib")


def _topics() -> Iterator[Document]:
    """The language reference as `help()` shows it; sections that a longer topic contains are left out."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:  # some systems ship it apart from the interpreter
        return
    for name, text in sorted(topics.items()):
        body = text.partition("\n\n")[2].strip()
        if not any(body in other for other in topics.values() if len(other) > len(text)):
            yield Document(text, "stdlib-docs", f"stdlib/pydoc_data/topics.py, topic {name}")


def _package_modules() -> Iterator[Document]:
    for package in _PACKAGES:
        for file in _package_files(package.distribution, package.modules, (".py",)):
            yield from _module(file, "package")


def _module(file: _File, origin: str) -> Iterator[Document]:
    """A module as it stands, or its docstrings when they are a large part of it."""
    text = _read(file.path)
    if text is None:
        return
    docs = _docstrings(text)
    if sum(len(doc) for _, doc in docs) < _DOCS_SHARE * len(text):
        yield Document(text, f"{origin}-code", file.place)
        return
    sections = [f"{name}\n\n{doc}" if name else doc for name, doc in docs]
    yield Document("\n\n\n".join(sections) + "\n", f"{origin}-docs", f"{file.place}, docstrings")


def _docstrings(source: str) -> list[tuple[str, str]]:
    """Qualified names and docstrings of a module in the order of its text; none where it does not parse."""
    try:
        with warnings.catch_warnings():
            # Old escapes in other people's strings are none of the user's business.
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
    """Long descriptions, guides and licences; of licences that differ only in who holds them, one is kept."""
    licences: set[str] = set()
    for package in _PACKAGES:
        for file in _package_files(package.distribution, ("",), ("", ".md", ".rst", ".txt")):
            text = _read(file.path) if _is_prose(file.path) else None
            if text is None:
                continue
            if file.path.name == "METADATA":
                text = text.partition("\n\n")[2]
            elif file.path.name.upper().startswith(_LICENCES):
                terms = "".join(line.strip() for line in text.splitlines() if "copyright (c)" not in line.lower())
                if terms in licences:
                    continue
                licences.add(terms)
            yield Document(text, "package-docs", file.place)


def _is_prose(path: Path) -> bool:
    if path.suffix in (".md", ".rst"):
        return True
    return path.name == "METADATA" or path.name.upper().startswith(_LICENCES)


def _headers() -> Iterator[Document]:
    files = list(_files_below(Path(sysconfig.get_path("include")), ".h", "include"))
    for package in _PACKAGES:
        if package.headers:
            files += _package_files(package.distribution, package.headers, (".h", ".hpp", ".cuh"))
    for file in files:
        text = _read(file.path)
        if text is not None:
            yield Document(text, "headers", file.place)


def _files_below(root: Path, ending: str, name: str) -> list[_File]:
    found = (path.relative_to(root) for path in root.rglob(f"*{ending}"))
    kept = (path for path in found if not _is_skipped(path))
    return sorted((_File(root / path, f"{name}/{path.as_posix()}") for path in kept), key=lambda file: file.place)


def _package_files(distribution: str, prefixes: tuple[str, ...], endings: tuple[str, ...]) -> list[_File]:
    """The wanted files among those that a distribution's own record lists; none where it is not installed."""
    try:
        files = metadata.distribution(distribution).files or []
    except metadata.PackageNotFoundError:
        return []
    wanted = (f for f in files if f.suffix in endings and f.as_posix().startswith(prefixes) and not _is_skipped(f))
    return sorted((_File(Path(str(f.locate())), f.as_posix()) for f in wanted), key=lambda file: file.place)


def _is_skipped(path: PurePath) -> bool:
    name = path.name
    if name.endswith(_SKIPPED_ENDINGS) or name.startswith("test_") or ".." in path.parts:
        return True
    return not _SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])


def _read(path: Path) -> str | None:
    """The text of a file, or None for one that is unreadable, not UTF-8, too long or a table of numbers."""
    try:
        data = path.read_bytes()
        digits = len(data) - len(data.translate(None, b"0123456789"))
        if len(data) > _MAX_FILE_BYTES or digits > _MAX_DIGIT_SHARE * len(data):
            return None
        return data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None

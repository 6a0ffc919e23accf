"""How Sphinx builds the site: `python -m sphinx -W docs docs/_build`.

Every page is executed while it is built, and a cell that raises ends the build.
"""

import dataclasses
import enum
import re

import ngd_jax

project = "ngd_jax"
author = "ngd_jax developers"
copyright = "2026, ngd_jax developers"  # noqa: A001  # Sphinx's name
release = version = ngd_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
default_role = "py:obj"  # docstrings write `name`; a public name becomes a link
nitpicky = False  # arrays and trees of other projects have no pages here
smartquotes_action = "D"  # dashes only: "exact" is a value

# --- Pages are notebooks in Markdown; their outputs come from this very build.
myst_enable_extensions = [
    "amsmath",
    "attrs_inline",
    "colon_fence",
    "deflist",
    "dollarmath",
]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

# --- API pages.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say what is what, with shapes and units
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_attr_annotations = False
python_maximum_signature_line_length = 80
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
copybutton_exclude = ".linenos, .gp, .go"  # of doctests, neither prompts nor outputs

# --- The look.
html_theme = "sphinx_book_theme"
html_title = "ngd_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "home_page_in_toc": True,
    "navbar_persistent": [],  # the search is in the sidebar
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}


# --- From the docstrings of this project to reStructuredText.


def as_restructured_text(_app, _what, _name, _obj, _options, lines):
    """Formulas, |v| and `jvp`s, as docstrings write them.

    A formula is an indented block of its own, which would become a quote.
    """
    result, is_formula, is_program = [], False, False
    for line in lines:
        is_deep = line.startswith("    ")
        is_first = bool(result) and not result[-1].strip() and _ends_text(result)
        if is_deep and is_first and not line.lstrip().startswith(">>>"):
            result += [".. code-block:: none", ""]
            is_formula = True
        is_formula &= is_deep or not line.strip()
        is_program |= line.lstrip().startswith(">>>")
        is_program &= bool(line.strip())
        if not (is_formula or is_program):
            # "direction: d." would begin an enumeration.
            line = re.sub(r"^(  \w+: )(\w)\.$", r"\1\2\\.", line)
            parts = line.split("`")
            parts[::2] = [part.replace("|", r"\|") for part in parts[::2]]
            line = re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", "`".join(parts))
        result.append(line)
    lines[:] = result


def _ends_text(lines):
    """Whether the last line that is not empty is one of text, at the left margin."""
    last = next((line for line in reversed(lines) if line.strip()), " ")
    return not last.startswith(" ")


def messages_of_enumerations(_app, what, _name, obj, _options, lines):
    """The members of a status, each with its number and what it means."""
    if what == "class" and issubclass(obj, enum.IntEnum):
        lines += ["", ".. list-table::", "   :widths: auto", ""]
        for member in obj:
            lines += [f"   * - {member.value}", f"     - ``{member.name}``"]
            lines += [f"     - {member.message}"]
        lines += [""]


def short_defaults(_app, what, _name, obj, _options, signature, returns):
    """Defaults as a user would write them, without what is a default itself."""
    if what == "class" and dataclasses.is_dataclass(obj) and not issubclass(obj, tuple):
        fields = [f for f in dataclasses.fields(obj) if f.init]
        if all(f.default_factory is dataclasses.MISSING for f in fields):
            signature = f"({', '.join(map(_argument, fields))})"
    elif what == "function" and signature:

        def value_of(match):
            value = _short(obj.__globals__[match[1]])
            return f"={value}" if len(value) < 20 else "=..."

        signature = re.sub(r"=(_[A-Z_]+)", value_of, signature)
    return signature, returns


def _argument(field):
    is_given = field.default is dataclasses.MISSING
    return field.name if is_given else f"{field.name}={_short(field.default)}"


def _short(value):
    if isinstance(value, float):
        text = f"{value:.4g}"
        return text if "." in text or "e" in text else f"{text}.0"
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", repr(value))
    fields = {f.name: f.default for f in dataclasses.fields(value)}
    changed = [k for k, default in fields.items() if getattr(value, k) != default]
    inside = ", ".join(f"{k}={_short(getattr(value, k))}" for k in changed)
    return f"{type(value).__name__}({inside})"


def resolve_short_names(app, env, node, contnode):
    """`CG` and `ngd.CG` are `ngd_jax.CG` from everywhere, also from the subpackages."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].removeprefix("ngd.")
    python = env.get_domain("py")
    full = f"ngd_jax.{name}"
    if full not in python.objects:
        return None
    return python.resolve_xref(
        env, node["refdoc"], app.builder, "obj", full, node, contnode
    )


def setup(app):
    """Sphinx calls this once."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-process-docstring", messages_of_enumerations, priority=600)
    app.connect("autodoc-process-signature", short_defaults)
    app.connect("missing-reference", resolve_short_names)

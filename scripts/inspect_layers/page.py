"""Write the tables of `scripts.inspect_layers` as HTML, LaTeX and plain text.

The HTML page is one file that needs nothing else. The template beside this file has style and behaviour. The tables are
ordinary HTML and can be read without the script. The details that hovering shows are in the page as JSON.
"""

import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loading.tokenizer import Tokenizer
from scripts.inspect_layers import charts
from scripts.inspect_layers.lens import TOP, Lens

TEMPLATE = Path(__file__).with_name("page.html")
SHORT_NAMES = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
LATEX = {  # what may not stand in LaTeX as it is
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "'": r"\textquotesingle{}",
    "`": r"\textasciigrave{}",
    "·": r"\textperiodcentered{}",
    "⏎": r"\textbackslash{}n",
    "⇥": r"\textbackslash{}t",
    "␍": r"\textbackslash{}r",
    "∅": r"$\emptyset$",
    "-": "{-}",
    ",": "{,}",  # two of them would become one character
}
LATEX_COLUMNS, TEXT_COLUMNS, TEXT_WIDTH = 8, 8, 8


@dataclass
class Model:
    """A checkpoint of the comparison: its texts seen through the lens, and `lens.summarise` of them."""

    name: str
    lenses: Sequence[Lens]
    summary: dict


def names_of(tokenizer: Tokenizer | None) -> Callable[[int], str]:
    """Return what names a token in a table: its text with visible white space, or its bytes if they are no text."""
    if tokenizer is None:
        return str
    special = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    token_bytes = tokenizer.vocabulary.token_bytes

    def name(token: int) -> str:
        data = token_bytes[token] if token < len(token_bytes) else b""
        if not data:
            return special.get(token, f"#{token}")
        try:
            text = data.decode()
        except UnicodeDecodeError:  # part of a character
            return "".join(f"\\x{byte:02x}" for byte in data)
        return "".join(visible(char) for char in text)

    return name


def visible(char: str) -> str:
    """Return a character, or something to see in its place."""
    if char in SHORT_NAMES:
        return SHORT_NAMES[char]
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def cell_marks(lens: Lens, depth: int, position: int) -> list[str]:
    """Return the template's class names for a cell.

    f: the final choice. s: stable from here on. x: a draft exited here. o: the full model's token. r: a rejected draft.
    """
    exit = lens.exit_of(position)
    marks = ["f"] if lens.agrees(depth, position) else []
    if lens.stable_from(position) == depth:
        marks.append("s")
    if exit and exit.depth == depth:
        marks.append("x" if exit.drafted else "o")
    if exit and exit.rejected and exit.rejected[1] == depth:
        marks.append("r")
    return marks


def write_html(models: Sequence[Model], name: Callable[[int], str], title: str, facts: dict[str, str]) -> str:
    """Write the page. models: one, or two that have read the same texts. facts: its first numbers, label -> value."""
    vocabulary: dict[int, int] = {}  # token id -> index in the page's list of names
    tables, parts = [], [f"<h1>{html.escape(title)}</h1>", introduction(), head_facts(facts), tools()]
    texts = len(models[0].lenses)
    for index in range(texts):
        parts.append(f"<h2>Text {index + 1}</h2>" if texts > 1 else "")
        parts.append('<div class="panels">')
        for model in models:
            parts.append('<div class="panel">')
            parts.append(f"<h3>{html.escape(model.name)}</h3>" if len(models) > 1 else "")
            parts += html_table(model.lenses[index], len(tables), name, f"{model.name}, text {index + 1}")
            parts.append("</div>")
            tables.append(table_data(model, index, vocabulary))
        parts.append("</div>")
    parts.append("<h2>Over all positions</h2>" if texts > 1 else "")
    parts.append('<div class="panels">')
    for model in models:
        parts.append('<div class="panel">' + (f"<h3>{html.escape(model.name)}</h3>" if len(models) > 1 else ""))
        parts.append(charts.charts(model.summary, model.lenses) + "</div>")
    parts.append("</div>")
    data = json.dumps({"vocab": [name(token) for token in vocabulary], "tables": tables}, separators=(",", ":"))
    replaced = {
        "title": html.escape(title),
        "body": "\n".join(filter(None, parts)),
        "data": data.replace("<", "\\u003c"),
    }  # no token can end the script
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(title|body|data)\}\}", lambda match: replaced[match[1]], template)


def introduction() -> str:
    return (
        "<p>Read a column from the bottom: a token goes in, climbs through the layers, and in each of them the final "
        "norm and the LM head name the token that would come next. The top row is the full model.</p>"
        '<p class="soft">Hover over a cell, or click it and use the arrow keys.</p>'
    )


def head_facts(facts: dict[str, str]) -> str:
    items = (f"<li><b>{html.escape(value)}</b><span>{html.escape(label)}</span></li>" for label, value in facts.items())
    return f'<ul class="facts">{"".join(items)}</ul>'


def tools() -> str:
    ramp = "".join(f'<i class="p{level}"></i>' for level in range(11))
    keys = {
        "x": "draft exited here",
        "r": "draft exited here and was rejected",
        "o": "full model's own token",
        "q": "proposed without the model",
        "s": "choice is final from here on",
    }
    legend = "".join(f'<span><i class="key {key}"></i>{text}</span>' for key, text in keys.items())
    return (
        '<div class="tools"><label>colour: <select id="colour"><option value="top">probability of the choice</option>'
        '<option value="next">probability of the token that comes next</option></select></label>'
        f'<span>0 <span class="ramp">{ramp}</span> 1</span>{legend}<span><b>bold</b>: the final choice</span></div>'
    )


def html_table(lens: Lens, index: int, name: Callable[[int], str], label: str) -> Iterator[str]:
    """Yield the lines of a table: layers from the top down, a column for each position."""
    columns = range(lens.positions)
    cuts = [" cut" if t == lens.prompt_length - 1 and t else "" for t in columns]  # from here the text is generated

    def ends(tag: str, what: str, tokens: Sequence[int], classes: Sequence[str]) -> str:
        cells = (
            f'<th scope="col" tabindex="-1"{class_of(c)}>{html.escape(name(token))}</th>'
            for token, c in zip(tokens, classes, strict=True)
        )
        return f'<{tag}><tr><th class="corner">{what}</th>{"".join(cells)}</tr></{tag}>'

    heads = []
    for t in columns:
        exit = lens.exit_of(t)
        proposed = exit is not None and exit.drafted and not exit.depth
        heads.append(cuts[t] + (" g" if t + 1 >= lens.prompt_length else "") + (" q" if proposed else ""))
    yield f'<div class="scroll"><table class="lens" data-index="{index}" aria-label="{html.escape(label)}">'
    yield ends("thead", "comes next", lens.tokens[1:], heads)
    yield "<tbody>"
    for depth in range(lens.n_layer, 0, -1):
        cells = []
        for t in columns:
            level = round(10 * lens.top_probs[depth - 1][t][0])
            classes = " ".join([f"p{level}", *cell_marks(lens, depth, t)]) + cuts[t]
            focus = 0 if depth == lens.n_layer and t == 0 else -1  # one stop for the tab key, arrows from there
            cells.append(f'<td class="{classes}" tabindex="{focus}">{html.escape(name(lens.choice(depth, t)))}</td>')
        yield f'<tr data-depth="{depth}"><th scope="row">{depth}</th>{"".join(cells)}</tr>'
    yield "</tbody>"
    yield ends("tfoot", "goes in", lens.tokens[:-1], cuts)
    yield "</table></div>"


def class_of(classes: str) -> str:
    return f' class="{classes.strip()}"' if classes.strip() else ""


def table_data(model: Model, index: int, vocabulary: dict[int, int]) -> dict:
    """Return the data of a table for the page's script. Probabilities: in 1/10000. Tokens: indices of `vocabulary`."""
    lens = model.lenses[index]

    def known(token: int) -> int:
        return vocabulary.setdefault(token, len(vocabulary))

    def parts(probs: Sequence[float]) -> list[int]:
        return [round(10_000 * p) for p in probs]

    return {
        "name": model.name,
        "text": index,
        "layers": lens.n_layer,
        "positions": lens.positions,
        "prompt": lens.prompt_length,
        "top": min(TOP, len(lens.top_ids[0][0])),
        "tokens": [known(token) for token in lens.tokens],
        "ids": [known(token) for layer in lens.top_ids for ids in layer for token in ids],
        "probs": [part for layer in lens.top_probs for probs in layer for part in parts(probs)],
        "next": [part for layer in lens.next_probs for part in parts(layer)],
        "ranks": [rank for layer in lens.next_ranks for rank in layer],
        "exits": [
            [
                exit.depth,
                int(exit.drafted),
                *((known(exit.rejected[0]), exit.rejected[1]) if exit.rejected else (-1, 0)),
            ]
            for exit in lens.departures
        ],
    }


def latex(text: str) -> str:
    return "".join(LATEX.get(char, char) for char in text)


def write_latex(models: Sequence[Model], name: Callable[[int], str]) -> str:
    """Write tables for a paper. Colour: the probability. Frame: a token exited here. Bold: the final choice."""
    lines = [
        "% Each table: what every layer would say. \\input this file; the preamble needs",
        "%   \\usepackage[T1]{fontenc} \\usepackage{textcomp} \\usepackage[table]{xcolor}",
        "% (tokens beyond Latin letters need xelatex or lualatex and a font that has them)",
        "\\setlength{\\fboxsep}{1pt}",
    ]
    for place, lens, columns in blocks(models, LATEX_COLUMNS):
        goes_in, comes_next = (
            (f"\\texttt{{{latex(name(lens.tokens[t + shift]))}}}" for t in columns) for shift in (0, 1)
        )
        lines += [f"\n% {place}", f"\\begin{{tabular}}{{r|{'c' * len(columns)}}}"]
        lines.append(latex_row("next", comes_next) + " \\hline")
        for depth in range(lens.n_layer, 0, -1):
            lines.append(latex_row(str(depth), (latex_cell(lens, depth, t, name) for t in columns)))
        lines += ["\\hline " + latex_row("in", goes_in), "\\end{tabular}"]
    return "\n".join(lines) + "\n"


def blocks(models: Sequence[Model], width: int) -> Iterator[tuple[str, Lens, range]]:
    """Yield (where, lens, positions) of every `width` positions of every text: tables on paper have an end."""
    for model in models:
        for index, lens in enumerate(model.lenses, 1):
            for first in range(0, lens.positions, width):
                columns = range(first, min(first + width, lens.positions))
                yield f"{model.name}, text {index}, positions {columns[0]} to {columns[-1]}", lens, columns


def latex_row(label: str, cells: Iterator[str]) -> str:
    return " & ".join([label, *cells]) + r" \\"


def latex_cell(lens: Lens, depth: int, position: int, name: Callable[[int], str]) -> str:
    marks, level = cell_marks(lens, depth, position), round(70 * lens.top_probs[depth - 1][position][0])
    text = f"\\texttt{{{latex(name(lens.choice(depth, position)))}}}"
    text = f"\\textbf{{{text}}}" if "f" in marks else text
    text = f"\\fbox{{{text}}}" if "x" in marks or "o" in marks else text
    return f"\\cellcolor{{blue!{level}}}{text}"


def write_text(models: Sequence[Model], name: Callable[[int], str]) -> str:
    """Write plain tables: the token, its probability in hundredths, and marks around it.

    [token]: it exited there. ~token~: a rejected draft. *: the choice is final from there on.
    """
    lines = [
        "[token]: exited there; ~token~: a draft that was rejected; *: final from there on; "
        "number: probability in hundredths"
    ]
    for place, lens, columns in blocks(models, TEXT_COLUMNS):
        lines += ["", place, text_row("next", [name(lens.tokens[t + 1]) for t in columns])]
        for depth in range(lens.n_layer, 0, -1):
            lines.append(text_row(str(depth), [text_cell(lens, depth, t, name) for t in columns]))
        lines.append(text_row("in", [name(lens.tokens[t]) for t in columns]))
    return "\n".join(lines) + "\n"


def text_row(label: str, cells: Sequence[str]) -> str:
    width = TEXT_WIDTH + 6
    return f"{label:>4} " + " ".join(f"{cell[:width]:<{width}}" for cell in cells).rstrip()


def text_cell(lens: Lens, depth: int, position: int, name: Callable[[int], str]) -> str:
    marks = cell_marks(lens, depth, position)
    text = name(lens.choice(depth, position))
    text = text if len(text) <= TEXT_WIDTH else text[: TEXT_WIDTH - 1] + "…"
    text = f"[{text}]" if "x" in marks or "o" in marks else f"~{text}~" if "r" in marks else text
    return f"{text}{'*' if 's' in marks else ''} {min(99, round(100 * lens.top_probs[depth - 1][position][0]))}"

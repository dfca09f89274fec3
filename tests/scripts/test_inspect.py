"""scripts.inspect_layers: the numbers are those of the decoding that they explain, and the page shows them."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from decoding.engine import Engine, EngineConfig
from decoding.generation import Generation
from decoding.runner import Runner
from drafting.plan import Round
from scripts.inspect_layers import __main__ as inspect_layers
from scripts.inspect_layers import lens, page
from scripts.inspect_layers.lens import Lens, TokenExit
from tests.helpers.models import train_tokenizer

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LAYERS = 6


def write_checkpoint(make_hf, folder, **config):
    train_tokenizer(folder, 380)
    make_hf(folder, vocab_size=380, num_key_value_heads=2, num_hidden_layers=LAYERS, **config)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():  # late layers that change little: drafts are sometimes right
        if re.search(r"layers\.[1-9].*(o_proj|down_proj)", name):
            tensor *= 0.25
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder(make_hf, tmp_path_factory):
    """A tiny checkpoint with a tokenizer."""
    return write_checkpoint(make_hf, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def other(make_hf, tmp_path_factory):
    """Another one, with its own weights and the same vocabulary."""
    return write_checkpoint(make_hf, tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture
def look(folder, tmp_path, run_program):
    """look(*flags, code=0) runs the program in this process -> (JSON object or None, folder, stdout + stderr)."""

    def look(*flags, code=0, source=folder):
        out = tmp_path / "out"
        defaults = [
            "--checkpoint_path",
            source,
            "--no-compile",
            "--max_new_tokens",
            12,
            "--ignore_eos",
            "--prompt",
            "def <b>&amp;</script>",
            "--output_dir",
            out,
        ]
        exit_code, *printed = run_program(inspect_layers.main, *defaults, *flags)
        printed = "".join(printed)
        assert exit_code == code, printed
        return json.loads((out / "layers.json").read_text()) if code == 0 else None, out, printed

    return look


class Page(html.parser.HTMLParser):
    """What a reader of the page finds: every tag, the cells of the first table by row, and what it refers to."""

    def __init__(self, source):
        super().__init__()
        self.open, self.rows, self.refers, self.text, self.cell = [], [], [], "", None
        self.feed(source)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.refers += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "xlink:href")]
        if tag not in ("meta", "line", "br", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.cell = ["", attributes]
            self.rows[-1].append(self.cell)

    def handle_endtag(self, tag):
        if tag not in ("meta", "line"):
            assert self.open.pop() == tag, f"{tag} closes another element"
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.cell[0] += data
        elif self.open[-1:] == ["script"]:
            self.text = data if not self.text else self.text  # the first script is the JSON


@pytest.mark.parametrize("policy", ["static:2,num_draft_tokens=4", "confidence:0.05,candidates=1-3-5", "none"])
def test_the_lens_shows_at_each_depth_the_token_that_exited_there(look, policy):
    result, _, _ = look("--policy", policy)
    [model], [generation] = result["models"], result["generations"]
    [text] = model["texts"]
    tokens, prompt, tops = text["tokens"], text["prompt_length"], text["top_ids"]
    assert tokens[prompt:] == generation["tokens"] and len(text["departures"]) == 12
    for index, exit in enumerate(text["departures"]):
        position = prompt + index - 1
        assert tops[LAYERS - 1][position][0] == tokens[prompt + index], "greedy: the text is the top layer's choice"
        if exit["drafted"]:
            assert tops[exit["depth"] - 1][position][0] == tokens[prompt + index]
        else:
            assert exit["depth"] == LAYERS
        if exit["rejected"]:
            token, depth = exit["rejected"]
            assert tops[depth - 1][position][0] == token != tokens[prompt + index]
    accepted = sum(exit["drafted"] for exit in text["departures"])
    assert accepted == generation["accepted"] and (accepted > 0 or policy == "none")
    assert sum(model["departures"]) == 12 and sum(model["stable_from"]) == model["positions"] == len(tokens) - 1


def close(found, expected):
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-3, atol=1e-5)


def test_numbers_are_those_of_hidden_states_computed_by_transformers(make_hf, tmp_path):
    reference = make_hf(tmp_path, num_hidden_layers=9, num_key_value_heads=2, vocab_size=90)
    model = Engine.open(EngineConfig(str(tmp_path), device="cpu"), needs_tokenizer=False).load()
    tokens = torch.randint(90, (80,), generator=torch.Generator().manual_seed(0)).tolist()  # more than one chunk
    found = lens.read(Runner(model, len(tokens)), tokens, 78, [TokenExit(3, True), TokenExit(9)])
    with torch.inference_mode():
        states = reference(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
        hooked = []
        handle = reference.model.layers[-1].register_forward_hook(lambda _, __, out: hooked.append(out))
        reference(torch.tensor([tokens[:-1]]))  # transformers norms the last state that it returns
        handle.remove()
        last = hooked[0][0] if isinstance(hooked[0], tuple) else hooked[0]
        states = [state[0] for state in (*states[:-1], last.reshape(1, -1, last.shape[-1]))]
        for depth in (1, 5, 9):
            probs = reference.lm_head(reference.model.norm(states[depth])).softmax(-1)
            expected = probs.topk(5)
            assert found.top_ids[depth - 1] == expected.indices.tolist()
            close(found.top_probs[depth - 1], expected.values)
            following = probs.gather(-1, torch.tensor(tokens[1:])[:, None])
            close(found.next_probs[depth - 1], following[:, 0])
            assert found.next_ranks[depth - 1] == (probs > following).sum(-1).tolist()
        for gap in (1, 2, 4, 8):
            cosines = [torch.cosine_similarity(states[at], states[at + gap], -1) for at in range(10 - gap)]
            close(found.cosines[gap], expected := torch.stack(cosines))
            summary = lens.summarise([found])
            assert summary["cosine_median"][gap] == pytest.approx(expected.quantile(0.5).item(), abs=1e-3)


def small_lens(choices, exits=(), prompt_length=1):
    """A lens whose choice at depth d and position t is choices[d - 1][t]."""
    tops = [[[token, 0] for token in row] for row in choices]
    probs = [[[0.75, 0.25] for _ in row] for row in choices]
    ranks = [[0 for _ in row] for row in choices]
    tokens = [1, *choices[-1]]
    return Lens(
        tokens,
        prompt_length,
        tops,
        probs,
        [[0.5] * len(choices[0])] * len(choices),
        ranks,
        {1: [[1.0] * len(choices[0])] * len(choices)},
        list(exits),
    )


def test_a_choice_is_stable_from_the_layer_after_the_last_other_one():
    found = small_lens([[7, 5, 5, 9], [6, 5, 4, 9], [7, 5, 5, 9], [7, 5, 5, 8]])
    assert [found.stable_from(t) for t in range(4)] == [3, 1, 3, 4]
    summary = lens.summarise([found])
    assert summary["stable_from"] == [1, 0, 2, 1] and summary["agreement"] == [0.75, 0.25, 0.75, 1.0]
    assert summary["departure_mean"] is None


def test_each_token_of_a_round_has_its_exit_and_a_rejected_draft_is_remembered():
    rounds = [
        Round((5, 6, 7), drafted=(5, 6, 9), accepted=2, exit_layers=(2, 3, 2)),
        Round((1, 2), drafted=(1,), accepted=1, exit_layers=(4,)),
        Round((3, 4), drafted=(3, 8), accepted=1),  # proposed: they never entered the model
        Round((3,), drafted=(3, 3), accepted=1, exit_layers=(1, 1)),  # cut by an end of text
        Round((8, 8), exit_layers=(2, 6)),  # early exit: nothing is verified
        Round((9,)),
    ]
    found = lens.token_exits(Generation(Round((4,)), rounds), 6)
    assert found == [
        TokenExit(6),
        TokenExit(2, True),
        TokenExit(3, True),
        TokenExit(6, False, (9, 2)),
        TokenExit(4, True),
        TokenExit(6),
        TokenExit(0, True),
        TokenExit(6, False, (8, 0)),
        TokenExit(1, True),
        TokenExit(2, True),
        TokenExit(6, True),
        TokenExit(6),
    ]


def test_the_page_is_well_formed_needs_nothing_else_and_shows_every_layer_and_position(look):
    result, out, printed = look("--policy", "static:2,num_draft_tokens=4")
    source = (out / "layers.html").read_text(encoding="utf-8")
    page, text = Page(source), result["models"][0]["texts"][0]
    assert page.refers == [] and not re.search(r"url\(|@import|https?://", source), "the page asks for another file"
    head, *layers, foot = page.rows[: LAYERS + 2]
    positions = len(text["tokens"]) - 1
    assert [row[0][0] for row in layers] == [str(depth) for depth in range(LAYERS, 0, -1)]
    assert all(len(row) == positions + 1 for row in (head, *layers, foot))
    for depth, row in zip(range(LAYERS, 0, -1), layers, strict=True):
        outlined = {at for at, (_, attributes) in enumerate(row[1:]) if {"x", "o"} & set(attributes["class"].split())}
        exited = [text["prompt_length"] - 1 + i for i, each in enumerate(text["departures"]) if each["depth"] == depth]
        assert outlined == set(exited), f"outlined at layer {depth}"
        for at, (_, attributes) in enumerate(row[1:]):
            assert f"p{round(10 * text['top_probs'][depth - 1][at][0])}" in attributes["class"].split()
    shown = "".join(cell for cell, _ in foot[1:])
    assert "def·<b>&amp;</script>" in shown, "what a prompt has of HTML is text"
    data = json.loads(page.text)
    [table] = data["tables"]
    assert len(table["ids"]) == len(table["probs"]) == LAYERS * positions * 5
    assert table["probs"][:5] == [round(10_000 * p) for p in text["top_probs"][0][0]]
    assert all(name in printed for name in ("layers.html", "layers.tex", "layers.txt", "layers.json"))


def test_a_token_cannot_end_the_script_or_the_table_and_white_space_is_seen():
    names = {1: "</script><!--", 2: "<td>", 3: "&lt;", 4: "\"'", 5: "{{body}}", 6: "a\\_^~%$#{}"}
    found = small_lens([[2, 3, 4, 5, 6]] * 2, [TokenExit(1, True), TokenExit(2)], 4)
    model = page.Model("<model>", [found], lens.summarise([found]))
    source = page.write_html([model], names.get, "<title>", {"<label>": "<value>"})
    shown = Page(source)
    assert [cell for cell, _ in shown.rows[1][1:]] == [names[i] for i in (2, 3, 4, 5, 6)]
    assert set(json.loads(shown.text)["vocab"]) >= set(names.values())
    body = page.write_latex([model], names.get)
    assert r"\textless{}td\textgreater{}" in body
    assert r"a\textbackslash{}\_\textasciicircum{}\textasciitilde{}\%\$\#\{\}" in body
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 1
    rows = [line for line in body.splitlines() if " & " in line]
    assert len(rows) == 4 and {line.count(" & ") for line in rows} == {5}
    assert body.count(r"\fbox{") == 2 and r"\cellcolor{blue!52}" in body
    plain = page.write_text([model], names.get)
    assert "[{{body}}]* 75" in plain and "[a\\_^~%$…] 75" in plain
    assert page.visible("\n") == "⏎" and page.visible("\u202e") == "\\u202e", "nothing turns the line around"


def test_latex_is_left_no_character_that_it_would_obey():
    ascii = [page.visible(chr(code)) for code in range(128)]
    escaped = [page.latex(char) for char in ascii]
    assert len(set(escaped)) == len(set(ascii)), "different characters stay different"
    text = page.latex("".join(ascii) + "·⏎⇥␍∅é€日")
    left = re.sub(r"\\[a-z]+\{\}|\\[{}$&#_%]|\$\\emptyset\$|\{[-,]\}", "", text)
    assert set(left) & set("\\{}$&#_%~^<>|\"'`-,·⏎⇥␍∅") == set()
    assert left.endswith("é€日") and "abc" in left and page.latex("a--b") == "a{-}{-}b"


def test_two_checkpoints_stand_side_by_side_over_the_same_text(look, other):
    result, out, printed = look("--compare_with", other, "--policy", "static:2")
    first, second = result["models"]
    assert first["texts"][0]["tokens"] == second["texts"][0]["tokens"]
    assert first["texts"][0]["top_ids"] != second["texts"][0]["top_ids"]
    assert second["departure_mean"] is None and first["departure_mean"] is not None
    source = (out / "layers.html").read_text(encoding="utf-8")
    assert source.count('<table class="lens"') == 2 and len(json.loads(Page(source).text)["tables"]) == 2
    assert first["name"] in printed and second["name"] in printed


def test_two_runs_give_the_same_numbers(look):
    results = [look("--policy", "confidence:0.05", "--temperature", "0.8", "--seed", "3")[0] for _ in range(2)]
    assert results[0]["models"] == results[1]["models"]


def test_mistakes_are_one_line_before_the_weights_are_read(look, folder, tmp_path, monkeypatch, make_hf):
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "file").write_text("")
    stranger = tmp_path / "stranger"
    shutil.copytree(folder, stranger)
    make_hf(stranger, vocab_size=400, num_hidden_layers=1)
    train_tokenizer(stranger, 350)
    for flags, message in (
        (["--format", "pdf"], "format must be among html, latex, text"),
        (["--policy", "static:7"], "exit_layer must be in 1..6"),
        (["--output_dir", tmp_path / "file"], "cannot make the folder"),
        (["--num_tables", "0"], "num_tables must be 1 or more"),
        (["--compare_with", tmp_path / "nowhere"], "nowhere"),
        (["--compare_with", stranger], "its vocabulary is not that of"),
        (["--max_new_tokens", "999"], "does not fit"),
    ):
        _, _, printed = look(*flags, code=2)
        assert message in printed and printed.count("\n") == 1, printed


CHECKS = """
<script>
window.addEventListener("load", () => {
  const say = (key, value) => document.body.setAttribute("data-" + key, value);
  const cells = [...document.querySelectorAll("table.lens td")], tip = document.getElementById("tip");
  say("cells", cells.length);
  say("drawn", cells.every(cell => cell.getBoundingClientRect().width > 20 && cell.getBoundingClientRect().height > 8));
  say("colours", new Set(cells.map(cell => getComputedStyle(cell).backgroundColor)).size);
  const scroll = document.querySelector(".scroll"), head = document.querySelector("thead th:nth-child(3)");
  const cell = document.querySelector("td.x");
  cell.dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
  say("tip", tip.textContent);
  say("shown", getComputedStyle(tip).display !== "none" && tip.getBoundingClientRect().width > 50);
  say("bars", tip.querySelectorAll(".bar i").length);
  const first = document.querySelector("td[tabindex='0']");
  first.focus();
  first.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
  say("key", document.activeElement.parentNode.dataset.depth + "/" + document.activeElement.cellIndex);
  const choose = document.getElementById("colour"), before = cells.map(each => each.className).join();
  choose.value = "next";
  choose.dispatchEvent(new Event("change"));
  say("recoloured", before !== cells.map(each => each.className).join());
  scroll.scrollLeft = 1e6;
  const corner = document.querySelector(".corner").getBoundingClientRect();
  say("sticky", Math.abs(corner.left - scroll.getBoundingClientRect().left) < 3);
  say("done", "yes");
});
</script>
"""


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason=f"no browser installed: none of {', '.join(BROWSERS)}")
def test_a_real_browser_draws_the_table_shows_top_5_on_hover_and_has_no_errors(look, tmp_path):
    result, out, _ = look("--policy", "static:2,num_draft_tokens=4", "--max_new_tokens", "40")
    page = tmp_path / "page.html"
    page.write_text((out / "layers.html").read_text(encoding="utf-8") + CHECKS, encoding="utf-8")
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    run = subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1000,800",
            "--virtual-time-budget=5000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = dict(re.findall(r' data-(\w+)="([^"]*)"', re.search("<body[^>]*>", run.stdout)[0]))
    assert "CONSOLE" not in run.stderr, run.stderr
    assert found.get("done") == "yes", f"the page's script stopped at {found}"
    positions = result["models"][0]["positions"]
    assert found["cells"] == str(LAYERS * positions) and found["drawn"] == "true" and int(found["colours"]) > 2
    assert found["shown"] == "true" and found["bars"] == "5"
    wanted = r"layer 2 of 6.*position \d+.*%.*comes next.*exited after layer 2"
    assert re.search(wanted, found["tip"]), found["tip"]
    assert found["key"] == f"{LAYERS - 1}/1" and found["recoloured"] == "true" and found["sticky"] == "true"

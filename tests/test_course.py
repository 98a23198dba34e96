"""notebooks/course.py: its figures, its first cell's search, and judges that call wrong wrong."""

import pathlib
import re
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from test_notebooks import NOTEBOOKS, cells_of

import phi3_ref

matplotlib.use("agg")
ROOT = pathlib.Path(phi3_ref.__file__).parent
sys.path.insert(0, str(ROOT / "notebooks"))
import course  # noqa: E402


def interleaved(x, cos, sin):
    """RoPE on neighbours, right: with a wrong order of components it is still a wrong answer."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return np.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(x.shape)


# By exercise: wrong answers that a learner may well give. Each notebook has a part of its own.
WRONG = {
    "0.1": [(26, 8, 32), (8, 26, 128), 8, "(8, 26, 32)"],
    "0.2": [lambda table, ids: table[ids[0]], lambda table, ids: ids, 5],
    "0.3": [lambda z: np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True),
            lambda z: np.exp(z - z.max()) / np.exp(z - z.max()).sum(), lambda z: z / z.sum()],
}
WRONG |= {
    "1.1": [3, lambda layers: None, lambda layers: lambda name, array: array,
            lambda layers: lambda name, array: 0 * array],
    "1.2": [[10], range(11), range(11, 26), "10 and all after it"],
    "1.3": [1_000_000, lambda *sizes: 1, lambda S, D, F, V, H, K, C, layers: {
        "query, key, value": layers * S * D * 3 * H * C, "scores and context": layers * S * S * C,
        "attention output": layers * S * D * D, "feed-forward": layers * 2 * S * D * F,
        "logits": S * V * D}],
}
WRONG |= {
    "2.1": [lambda x, cos, sin: x, (phi3_ref.rotary_embedding, np.arange(32)),
            (interleaved, np.arange(32)), (interleaved, np.zeros(32, int)),
            (interleaved, np.arange(32).reshape(16, 2).T.reshape(-1))],
    "2.2": [320_000, 10_000, 10_000 * 32 ** (48 / 47) * 1.02, "larger"],
    "2.3": [32, 31, 24 + 7 + 30, 100],
}
WRONG |= {
    "4.1": ["transformer_layer_0", "token_embedding", "logits", "pre_attention_layernorm", 3],
    "4.2": [[1e-3] * 16, [1e-3] * 5, "the residual stream"],
    "4.3": ["transformer_layer_2.feedforward_gate", "logits", "transformer_layer_2", "float16"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return phi3_ref.Phi3Tokenizer.from_preset("phi3_tiny_puzzles_en")


def test_labels_tell_special_tokens_from_letters(tokenizer):
    ids = [tokenizer.start_token_id, *tokenizer("<|user|>\ns +<|end|>")]
    assert course.labels(tokenizer, np.array(ids)) == [
        "<s>", "▁", "<|user|>", "↵", "s", "▁", "+", "<|end|>"]


@pytest.mark.parametrize("parts", [(), ("attention", "kv_cache"), ("gradients", "loss")])
def test_the_map_has_all_parts_and_lights_those_named(parts, monkeypatch):
    drawn = []
    monkeypatch.setattr(course.plt, "show", lambda: drawn.append(course.plt.gcf()))
    course.you_are_here(*parts, large=True)
    texts = {text.get_text(): text for text in drawn[0].axes[0].texts}
    lit = {part for part, (text, *_) in course.PARTS.items() if texts[text].get_color() == "black"}
    assert set(parts) - course.LINES <= lit
    assert all(text.get_fontsize() >= 8 for text in texts.values() if text.get_text())
    drawn[0].canvas.draw()
    edge = drawn[0].bbox
    for text in texts.values():  # nothing is cut off
        box = text.get_window_extent()
        assert edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1
    course.plt.close(drawn[0])


def test_the_map_names_a_part_it_does_not_have():
    with pytest.raises(ValueError, match=r"has no \['attenton'\], but .*'attention'"):
        course.you_are_here("attenton")


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in WRONG
                                             for index in range(len(WRONG[name]))])
def test_wrong_answers_are_called_wrong(name, index, capsys):
    assert course.check(name, WRONG[name][index]) is False
    assert re.match(rf"Exercise {name}: not yet\. \S.*\nHint \d of \d: \S",
                    capsys.readouterr().out)


def test_every_exercise_has_wrong_answers_and_a_heading():
    headings = re.findall(r"^### Exercise (\d+\.\d) [★☆]{3} \S", "\n".join(
        cell.source for path in NOTEBOOKS for cell in cells_of(path, "markdown")), re.MULTILINE)
    assert sorted(headings) == sorted(course.JUDGES) == sorted(WRONG)
    assert all(len(answers) >= 2 for answers in WRONG.values())


def test_hints_grow_and_nothing_is_raised(capsys, monkeypatch):
    monkeypatch.setattr(course, "wrong_answers", {})
    said = []
    for answer in (None, [0], [1], [2], [3]):
        assert course.check("1.2", answer) is False
        said.append(capsys.readouterr().out)
    assert said[0] == "Exercise 1.2: not answered yet.\n"
    assert ["Hint 1 of 2" in said[1], *("Hint 2 of 2" in text for text in said[2:])] == [True] * 4
    assert course.check("9.99", 1) is False
    assert "no exercise '9.99'" in capsys.readouterr().out


@pytest.mark.parametrize("answer, wrong", [
    ("x", "should be numbers"), ([1.0], "has shape [1], and should have [2]"),
    ([1, np.nan], "not finite"), ([1, 3], "not the right numbers, most at index [1]")])
def test_difference_says_what_is_wrong(answer, wrong):
    assert wrong in course.difference(answer, [1, 2])
    assert course.difference([1, 2.0001], [1, 2]) is None


@pytest.mark.parametrize("place", ["", "notebooks", "clone"])
def test_the_first_cell_finds_the_modules_from_any_directory(tmp_path, place):
    """In the repository, in its notebooks, in the directory in which it was cloned; or says so."""
    clone = tmp_path / "clone"
    (clone / "notebooks").mkdir(parents=True)
    for name in ("phi3_ref.py", "notebooks/course.py"):
        (clone / name).symlink_to(ROOT / name)
    code = cells_of(NOTEBOOKS[0], "code")[0].source.replace("%matplotlib inline", "")

    def run(directory):
        return subprocess.run([sys.executable, "-c", code], cwd=directory, capture_output=True,
                              text=True, env={"MPLBACKEND": "agg", "HOME": str(tmp_path)})

    assert run(tmp_path if place == "clone" else clone / place).returncode == 0
    if place == "clone":
        empty = tmp_path / "clone" / "empty" / "deep"
        (clone / "phi3_ref.py").unlink()
        empty.mkdir(parents=True)
        assert "FileNotFoundError: No phi3_ref.py in" in run(empty).stderr

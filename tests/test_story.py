"""The first part of phi3_ref.py is a story: it is short, and each part uses what is above it."""

import ast
import pathlib

import phi3_ref

SOURCE = pathlib.Path(phi3_ref.__file__).read_text(encoding="utf-8")
STORY = SOURCE[: SOURCE.index("# ==== Here the story ends")]
# The fast twins stand after the model, and what checks arrays or starts threads in the appendix:
# one call each.
AHEAD = {"linear_backward": {"linear"}, "linear": {"on_cores"}, "upcast_weight": {"is_finite"},
         "functions_for": {"linear", "rms_norm", "attention", "rms_norm_backward",
                           "attention_backward"},
         "Phi3Config": {"check_config"}, "KVCache": {"check_room"}, "forward": {"check_cache"},
         "rms_norm": {"check_rms_norm"}, "AdamW": {"check_optimizer", "check_learning_rate"},
         "attention": {"check_attention"}, "attention_backward": {"check_attention"}}


def test_the_story_is_an_evenings_reading():
    """About 1,000 lines, forward and backward."""
    assert STORY.count("\n") <= 1190


def names_in(node):
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def test_each_part_uses_only_what_stands_above_it():
    """Read from top to bottom, no name comes before its definition, but for those in AHEAD."""
    definitions = [node for node in ast.parse(SOURCE).body
                   if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    known = {node.name for node in definitions}
    above = set()
    for node in definitions:
        if node.lineno > STORY.count("\n"):
            break
        local = {part.arg for part in ast.walk(node) if isinstance(part, ast.arg)} | {
            part.id for part in ast.walk(node)
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        above.add(node.name)
        ahead = (names_in(node) & known) - local - above
        assert ahead == AHEAD.get(node.name, set()), f"{node.name} uses {ahead}"


def test_no_file_and_no_hub_stands_in_the_story():
    """Nothing is read or written there, and nothing is imported but the kernels."""
    tree = ast.parse(STORY)
    used = {part.attr for part in ast.walk(tree) if isinstance(part, ast.Attribute)}
    used |= names_in(tree)
    assert not used & {"open", "read_text", "read_bytes", "Path", "json", "require", "warnings"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                and node.col_offset for alias in node.names}
    assert imported == {"kernels_cuda"}

"""Sweep files: every key, type and name, what options change in them, and grids that are put together."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsnet.errors import ConfigError
from pipeline.sweep_file import SweepFile, SweepPart, read_sweep_file

WHOLE = """
out: sweeps/kernels
stores: [pascal-resnet101.zarr, b.zarr]
folds: [0, 2]
heads: [hsnet, cosine]
seeds: [0, 1]
steps: 20
fix: {batch_size: 4, learning_rate: 1e-3, recipe: hsnet, drop_novel_images: yes}
vary:
  kernel: [center-pivot, original]
  layers: [all, [1, 3], 2]
protocol: hsnet
set: {ignore: no, tau: 0.25, seeds: [0]}
shots: [1, 5]
episodes: 100
transfer: [other.zarr]
parts:
  - {}
  - stores: [b.zarr]
    vary: {support_mask: [no]}
"""


@pytest.fixture
def read(tmp_path: Path):
    def reader(text: str) -> SweepFile:
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return read_sweep_file(path)

    return reader


def test_all_keys_are_read_with_their_types(read):
    found = read(WHOLE)
    assert found.stores == ("pascal-resnet101.zarr", "b.zarr")
    assert found.folds == (0, 2)
    assert found.fix == {"batch_size": 4, "learning_rate": 0.001, "recipe": "hsnet", "drop_novel_images": True}
    assert found.vary == {"kernel": ("center-pivot", "original"), "layers": ("all", "1,3", "2")}
    assert found.set == {"ignore": False, "tau": 0.25, "seeds": (0,)}
    assert found.parts == (SweepPart(), SweepPart(stores=("b.zarr",), vary={"support_mask": (False,)}))
    rules = found.rules()
    assert (rules.name, rules.episodes, rules.shots, rules.ignore) == ("hsnet", 100, (1, 5), False)


def test_a_file_gives_the_cases_that_options_give(read):
    """A choice is the same whether a file or an option says it, down to the name of the case."""
    from pipeline.sweep import make_cases, parse_axis

    found = read("stores: [s.zarr]\nfolds: [0]\nsteps: 7\nvary: {learning_rate: [1e-3, 1], seed: [0, 3]}\n")
    varied = dict([parse_axis("learning_rate=1e-3,1"), parse_axis("seed=0,3")])
    assert found.all_cases({}) == make_cases(["s.zarr"], [0], varied, {"steps": 7})


def test_parts_lie_over_what_stands_above_them(read):
    first, second = read(WHOLE).grids()
    assert first.stores == ("pascal-resnet101.zarr", "b.zarr")
    assert second.stores == ("b.zarr",)
    assert second.vary == {**first.vary, "support_mask": (False,)}
    assert second.transfer == first.transfer
    cases = read(WHOLE).all_cases({})
    names = [case.name for case in cases]
    assert len(names) == len(set(names))
    assert "b-kernel=original-layers=1,3-support_mask=False-seed=1-fold2" in names
    assert names.count("b-head=cosine-seed=0-fold0") == 1, "both parts have it, one case is made"
    assert {case.choices["steps"] for case in cases if case.is_trained} == {20}
    assert {case.transfer for case in cases} == {("other.zarr",), ()}


def test_options_win_over_the_file_in_every_part(read):
    said = SweepFile(steps=3, vary={"kernel": ("separable",)}, fix={"layers": "all"}, shots=(1,), set={"ignore": True})
    found = read(WHOLE).under(said)
    assert found.rules().shots == (1,)
    assert found.set == {"ignore": True, "tau": 0.25, "seeds": (0,)}
    for part in found.grids():
        assert part.vary["kernel"] == ("separable",)
        assert "layers" not in part.vary
        assert part.fix["layers"] == "all"
    assert {case.choices["steps"] for case in found.all_cases({}) if case.is_trained} == {3}
    over = read(WHOLE).under(SweepFile(vary={"seed": (9,)}, fix={"steps": 5}, stores=("c.zarr",), out="x"))
    cases = over.all_cases({})
    assert {case.choices["seed"] for case in cases} == {9}
    assert {case.choices["steps"] for case in cases if case.is_trained} == {5}
    assert {case.store for case in cases} == {"c.zarr"}
    assert over.out == "x"
    assert read(WHOLE).under(SweepFile()) == read(WHOLE)
    varied = read(WHOLE).under(SweepFile(vary={"learning_rate": (0.1, 0.2)})).all_cases({})
    assert {case.choices.get("learning_rate") for case in varied if case.is_trained} == {0.1, 0.2}, "fixed in the file"


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("out: a\nvari: {seed: [1]}", 2, "unknown key 'vari'.*did you mean 'vary'"),
        ("vary: {kernl: [original]}", 1, "'kernl' is no choice of a sweep.*did you mean 'kernel'"),
        ("vary:\n  seed: []", 2, "vary: seed is an empty list"),
        ("vary: {seed: 1}", 1, "vary: seed must be a list, such as .*; got 1"),
        ("vary: {}", 1, "vary must hold 'key: value' lines"),
        ("fix: {learning_rate: fast}", 1, "learning_rate must be a number, got 'fast'"),
        ("fix: {support_mask: perhaps}", 1, "support_mask must be yes or no, got 'perhaps'"),
        ("fix: {batch_size: 2.5}", 1, "batch_size must be a whole number, got 2.5"),
        ("fix: {batch_size: yes}", 1, "batch_size must be a whole number, got yes"),
        ("fix: {kernel: yes}", 1, "kernel must be text, got yes"),
        ("fix: {seed: {a: 1}}", 1, "a mapping cannot stand here"),
        ("fix: {recipe: stabel}", 1, "no training recipe 'stabel'.*did you mean 'stable'"),
        ("fix: {head: cosine}", 1, "'head' is no choice of a sweep; heads stand under `heads`"),
        ("fix: {fold: 1}", 1, "folds stand under `folds`"),
        ("heads: [hsnet, cosin]", 1, "no head 'cosin'.*did you mean 'cosine'"),
        ("heads: []", 1, "heads is an empty list"),
        ("stores: a.zarr", 1, "stores must be a list.*got 'a.zarr'"),
        ("stores: [1]", 1, "stores must be a list of names"),
        ("folds: some", 1, "folds must be a list.*got 'some'"),
        ("folds: [-1]", 1, "folds must be a list of whole numbers from 0, or the word all"),
        ("seeds: [0.5]", 1, "seeds must be a list of whole numbers from 0"),
        ("shots: [0]", 1, "shots must be a list of whole numbers from 1"),
        ("steps: many", 1, "steps must be a whole number from 1, got 'many'"),
        ("episodes: 0", 1, "episodes must be a whole number from 1, got 0"),
        ("out: [a]", 1, r"out must be text, got \['a'\]"),
        ("out:", 1, "out must be text, got nothing"),
        ("protocol: hsnt", 1, "no protocol 'hsnt'.*did you mean 'hsnet'"),
        ("set: {ignor: no}", 1, "a protocol has no choice 'ignor'.*did you mean 'ignore'"),
        ("set: {ignore: 3}", 1, "ignore must be yes or no, got 3"),
        ("set: {shots: x}", 1, "shots must be a list of whole numbers, got 'x'"),
        ("parts: []", 1, "parts is an empty list"),
        ("parts:\n- {}\n- {out: a}", 3, "unknown key 'out'; a part has stores"),
        ("steps: 1\nsteps: 2", 2, "'steps' stands here twice"),
        ("- a", 1, "must hold 'key: value' lines"),
        ("[a]: b", 1, "must be a word"),
    ],
)
def test_what_a_file_may_not_say(read, text, line, said):
    with pytest.raises(ConfigError, match=rf"sweep.yaml, line {line}: .*{said}.*[.?] Nothing was done.$"):
        read(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold 'key: value' lines"),
        ("a: [", "is not readable YAML"),
        ("out: !!python/object/apply:os.system [id]", "out must be text"),
        ("out: !!python/name:os.system x", "is not readable YAML"),
        ("out: &x a\nprotocol: *x", "uses aliases"),
        ("stores: " + "[" * 600, "more than 500 opening brackets"),
        ("#" * 100_001, "more than 100,000 bytes"),
        ("\x00", "is not readable YAML"),
    ],
)
def test_files_that_are_none(read, text, said):
    with pytest.raises(ConfigError, match=said):
        read(text)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"Cannot read the sweep file .*none.yaml: No such file"):
        read_sweep_file(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Cannot read the sweep file"):
        read_sweep_file(tmp_path)


def test_grids_that_cannot_be(read):
    def cases(text, **folds):
        return read(text).all_cases({f"{name}.zarr": number for name, number in folds.items()})

    for text, said in (
        ("steps: 1", "A sweep needs a store"),
        ("stores: [a.zarr]", "'all' folds cannot be told without the stores: a.zarr is not there"),
        ("stores: [a.zarr, a.zarr/]\nfolds: [0]", "different names"),
        ("stores: [a.zarr]\nfolds: [0]\nfix: {seed: 1}\nvary: {seed: [2]}", "both varied and fixed"),
        ("stores: [a.zarr]\nfolds: [0]\nseeds: [0]\nvary: {seed: [1, 2]}", r"`seeds` says \[0\], and .*\[1, 2\]"),
        ("stores: [a.zarr]\nfolds: [0]\nsteps: 3\nfix: {steps: 4}", "`steps` says 3, and .*: 4. Say it once"),
        (
            "stores: [a.zarr]\nfolds: [0]\nparts: [{fix: {depth: 2}}, {fix: {depth: 3}}]",
            r"Two parts of the sweep both have a case 'a-fold0', with other choices: depth=2, .* and depth=3",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            cases(text)
    with pytest.raises(ConfigError, match=r"Not every store has fold 7; folds of all: \[0, 1\]"):
        cases("stores: [a.zarr, b.zarr]\nfolds: [0, 7]", a=[0, 1], b=[0, 1, 7])
    assert [case.fold for case in cases("stores: [a.zarr, b.zarr]\nfolds: all", a=[0, 1], b=[1, 7])] == [1, 1]
    part = "parts: [{vary: {seed: [1]}}, {fix: {steps: 4}}]"
    said = [case.choices for case in cases(f"stores: [a.zarr]\nfolds: [0]\nseeds: [0]\nsteps: 3\n{part}")]
    assert said == [{"steps": 3, "seed": 1}, {"steps": 4, "seed": 0}], "a part stands over what is above it"

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tct_hf.files import write_json_atomic
from tct_hf.settings import SettingsError, hide_passwords, load_settings, resolved_yaml, run_recipe, save_resolved

PROJECT = Path(__file__).resolve().parent.parent


@dataclass
class Arguments:
    """Stands for the training arguments that a recipe passes on."""

    learning_rate: float = 1e-5
    bf16: bool = False
    save_strategy: Literal["no", "steps"] = "steps"
    report_to: str | list[str] | None = None
    warmup: int | None = None
    hub_token: str | None = None


@dataclass
class Index:
    factory: str = "auto"
    probes: int = 1

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"probes must be at least 1, got {self.probes}")


@dataclass
class Settings:
    output_dir: str
    epochs: int = field(default=1, metadata={"help": "Passes over the data."})
    temperature: float = 0.25
    resume: bool = False
    alpha: float | Literal["auto"] = "auto"
    limit: int | None = None
    revision: str | None = None
    measures: list[str] = field(default_factory=lambda: ["RR@10"])
    columns: dict[str, str] = field(default_factory=dict)
    index: Index = field(default_factory=lambda: Index(probes=8))
    training: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Passed on.", "keys_of": f"{__name__}:Arguments"}
    )
    model_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lazy:
    output_dir: str = "out"
    training: dict[str, Any] = field(default_factory=dict, metadata={"keys_of": "no_such_module:Arguments"})


def load(*argv: str, schema: type[Any] = Settings) -> Any:
    return load_settings(schema, list(argv), description="Test.")


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(*argv)
    return str(caught.value)


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path / "a.yaml", "output_dir: out\nepochs: 2\ntemperature: 1\nindex: {factory: Flat}\n")
    settings = load(config, "--epochs", "3", "--index.probes=4")
    assert (settings.output_dir, settings.epochs, settings.temperature, settings.resume) == ("out", 3, 1.0, False)
    assert settings.index == Index("Flat", 4) and type(settings.temperature) is float
    # A section keeps what the schema made for it.
    assert load("--output_dir", "o", "--index.factory", "Flat").index == Index("Flat", 8)


def test_extends_merges_mappings_and_replaces_lists_along_the_chain(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    root = "output_dir: out\nepochs: 5\nmeasures: [AP, RR@10]\ncolumns: {a: x, b: y}\n"
    write(tmp_path / "base" / "root.yaml", root)
    write(tmp_path / "base" / "middle.yaml", "extends: root.yaml\nepochs: 6\ntraining: {bf16: true}\n")
    leaf = "extends: base/middle.yaml\nmeasures: [nDCG@10]\ncolumns: {b: z}\ntraining: {learning_rate: 1e-4}\n"
    settings = load(write(tmp_path / "leaf.yaml", leaf))
    assert '"columns": a mapping' in error_of(write(tmp_path / "other.yaml", "extends: leaf.yaml\ncolumns: [b]\n"))
    assert settings.epochs == 6 and settings.measures == ["nDCG@10"] and settings.columns == {"a": "x", "b": "z"}
    assert settings.training == {"bf16": True, "learning_rate": 1e-4}


def test_files_that_cannot_be_read_are_named_with_who_asked_for_them(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "b.yaml: extends: a circle: a.yaml -> b.yaml -> a.yaml" in error_of(str(tmp_path / "a.yaml"))
    assert "No such file" in error_of(str(tmp_path / "none.yaml"))
    assert "c.yaml: extends: /" in error_of(write(tmp_path / "c.yaml", "extends: none.yaml\n"))


UNREADABLE = "a.yaml cannot be read as a settings file:"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch: 2\n", "\"epoch\": Key 'epoch' not in 'Settings'. Did you mean: 'epochs'?"),
        ("index: {probe: 3}\n", "\"index.probe\": Key 'probe' not in 'Index'. Did you mean: 'probes'?"),
        ("training: {bf61: true}\n", "\"training.bf61\": Key 'bf61' not in 'Arguments'. Did you mean: 'bf16'?"),
        ("epochs: three\n", "\"epochs\": Value 'three' of type 'str' could not be converted to Integer"),
        ("epochs:\n", "\"epochs\": Incompatible value 'None' for field of type 'int'"),
        ("limit: none\n", "\"limit\": Value 'none' of type 'str' could not be converted to Integer"),
        ("revision: 007\n", '"revision" must be a text, got 7; write it in quotes'),
        ("alpha: most\n", "\"alpha\": Value 'most' of type 'str' is incompatible"),
        ("measures: AP\n", '"measures": a list is needed; write [a, b, c]'),
        ("measures:\n  - AP\n  - 3\n", '"measures.1" must be a text, got 3; write it in quotes'),
        ("measures: {a: AP}\n", '"measures": a list is needed'),
        ("index: 3\n", '"index": a mapping is needed; write {name: value}'),
        ("training: [bf16]\n", '"training": a mapping is needed'),
        ("columns: {query: [a]}\n", '"columns.query": one value is needed'),
        ("index: {probes: 0}\n", "probes must be at least 1, got 0"),
        ("training: {learning_rate: fast}\n", "\"training.learning_rate\": Value 'fast' of type 'str'"),
        ("training: {hub_token: abc}\n", '"training.hub_token" is a secret'),
        ("model_kwargs: {a: {b: hf_abcdefghijklmnopqrstuvwxyz}}\n", '"model_kwargs.a.b" is a secret'),
        ("epochs: 1\nepochs: 2\n", "found duplicate key epochs"),
        ("epochs: [1\n", 'a.yaml", line 2'),
        ("- 1\n", "a.yaml: the file must hold settings"),
        ("epochs: !!python/name:os.system x\n", "could not determine a constructor"),
        (f"model_kwargs: {{a: {'[' * 60}{']' * 60}}}\n", f"{UNREADABLE} nested too"),
        (f"model_kwargs: {'{a: ' * 200}1{'}' * 200}", f"{UNREADABLE} nested too"),
        ("extends: [a.yaml]\n", "a.yaml: extends must name one YAML file"),
    ],
)
def test_yaml_mistakes_name_the_setting_and_the_fix(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path / "a.yaml", text), "--output_dir", "out")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--epoch", "2"], "Did you mean: 'epochs'?"),
        (["--epochs"], "--epochs: a value is missing"),
        (["--epochs", "--resume"], "--epochs: a value is missing"),
        (["--epochs.x", "1"], '"epochs": one value is needed'),
        (["--training.bf61"], "Did you mean: 'bf16'?"),
        (["--model_kwargs" + ".a" * 200, "1"], "--model_kwargs: its value is nested too deeply"),
        (["--model_kwargs.a", "[" * 60 + "]" * 60], "--model_kwargs: its value is nested too deeply"),
        (["-e", "1"], "'-e': write one settings file, and options as --key value"),
        (["a.yaml", "b.yaml"], "'b.yaml': write one settings file"),
        ([], '"output_dir" must be given: --output_dir VALUE, or in the YAML'),
    ],
)
def test_command_line_mistakes_name_the_option_and_the_fix(argv: list[str], expected: str) -> None:
    assert expected in error_of(*argv)


def test_yaml_numbers_switches_and_dates_are_read_as_people_mean_them(tmp_path: Path) -> None:
    config = write(
        tmp_path / "a.yaml",
        "output_dir: out\nepochs: 1_000\ntemperature: 1e-4\nresume: yes\nrevision: 2024-01-01\nlimit: 3\n"
        "training: {save_strategy: 'no', bf16: off, report_to: none}\nmodel_kwargs: {a: '${output_dir}/b'}\n",
    )
    settings = load(config)
    assert (settings.epochs, settings.temperature, settings.resume) == (1000, 1e-4, True)
    assert settings.revision == "2024-01-01" and settings.model_kwargs == {"a": "out/b"}
    assert settings.training == {"save_strategy": "no", "bf16": False, "report_to": "none"}
    for word in ("null", "none", "~"):  # takes an optional setting back
        settings = load(config, "--limit", word, f"--revision={word}")
        assert settings.limit is None and settings.revision is None
    for option in (["--resume", "false"], ["--resume=no"]):
        assert load(config, *option).resume is False
    assert load("--resume", config, "--training.bf16").training["bf16"] is True  # switches may stand alone


def test_command_line_values_are_yaml_except_where_text_is_wanted() -> None:
    settings = load(
        "--output_dir", "[Q] x: {", "--measures", "RR@10,AP", "--columns", "{query: anchor}", "--alpha", "0.1",
        "--temperature", "-1", "--model_kwargs.a.b", "[1, x]", "--revision", "007", "--epochs", "2", "--epochs", "3",
        "--training.learning-rate", "1e-3", "--columns.my-key", "v",
    )  # fmt: skip
    assert settings.output_dir == "[Q] x: {" and settings.measures == ["RR@10", "AP"]
    assert settings.columns == {"query": "anchor", "my-key": "v"}
    assert settings.temperature == -1.0 and settings.alpha == 0.1 and settings.training == {"learning_rate": 1e-3}
    assert settings.model_kwargs == {"a": {"b": [1, "x"]}} and settings.revision == "007"
    assert settings.epochs == 3  # the last of repeated options


def test_the_class_behind_a_mapping_is_imported_only_when_a_key_is_given() -> None:
    assert load(schema=Lazy).training == {}
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        load("--training.x", "1", schema=Lazy)


def test_help_shows_every_setting_and_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--nonsense", "--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--epochs  int (default 1)\n      Passes over the data." in shown
    assert "--output_dir  str (must be given)" in shown and "--index.probes  int (default 8)" in shown
    assert f"--training.KEY  any field of {__name__}:Arguments (default {{}})" in shown


MODELS = {"torch", "transformers", "sentence_transformers", "accelerate"}
DATA = "data data.builtin data.beir pipeline.passage_ranking evaluation.measures"
SEARCH = "retrieval.negatives retrieval.runs retrieval.bm25 retrieval.dense"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("settings files progress hub_client", {"torch", "transformers", "datasets", "numpy"}),
        (f"{DATA} {SEARCH}", MODELS),
    ],
)
def test_importing_loads_nothing_heavy(modules: str, heavy: set[str]) -> None:
    imported = ", ".join(f"tct_hf.{name}" for name in modules.split())
    code = f"import sys, tct_hf, {imported}\nsys.exit(' '.join({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


words = st.text(alphabet="aenoyslNE01289.-+:_~ #'\"\n[]{}é", max_size=8)


@hypothesis_settings(deadline=None, max_examples=25)
@given(text=words, items=st.lists(words), number=st.floats(allow_nan=False), mapping=st.dictionaries(words, words))
def test_any_resolved_settings_load_again_to_the_same(
    tmp_path_factory: pytest.TempPathFactory, text: str, items: list[str], number: float, mapping: dict[str, str]
) -> None:
    settings = Settings(text, temperature=number, revision=text, measures=items, columns=mapping)
    settings.model_kwargs = {"text": text, "number": number, "items": items}
    config = write(tmp_path_factory.mktemp("settings") / "a.yaml", resolved_yaml(settings))
    assert load(config) == settings


def test_a_run_leaves_its_settings_and_what_it_ran_on(tmp_path: Path) -> None:
    settings = load("--output_dir", "o")
    save_resolved(settings, tmp_path / "out", extra={"corpus_fingerprint": "abc"})
    assert load(str(tmp_path / "out" / "settings.yaml")) == settings
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["corpus_fingerprint"] == "abc" and environment["packages"]["pyyaml"]
    assert {"python", "platform", "cpu_count", "torch_threads"} <= environment.keys()


def test_a_recipe_has_the_name_of_its_file_however_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(settings: Lazy) -> None:
        save_resolved(settings, settings.output_dir, extra={})

    for program in ("/usr/bin/tct-hf", "-c", "recipes/train.py"):
        monkeypatch.setattr(sys, "argv", [program])
        run_recipe(main, Lazy, "Test.", ["--output_dir", str(tmp_path)])
    assert json.loads((tmp_path / "environment.json").read_text())["recipe"] == "test_settings"


def test_recipes_end_with_one_message_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> Any:
        def main(settings: Settings) -> None:
            raise error

        return main

    right = ["--output_dir", "o"]
    for main, argv, status, shown in (
        (raises(ValueError("a bug")), ["--epoch", "1"], 2, 'error: "epoch": Key'),
        (lambda settings: write_json_atomic("a.json", float("nan")), right, 1, "this cannot be written as JSON"),
        (raises(KeyboardInterrupt()), right, 130, "interrupted; to go on: "),
        (raises(PermissionError(13, "Permission denied", "o/x")), right, 1, "error: output_dir: o/x can't be written"),
        (raises(PermissionError(13, "Permission denied", "/in")), right, 1, "error: /in: Permission denied"),
    ):
        with pytest.raises(SystemExit) as caught:
            run_recipe(main, Settings, "Test.", argv)
        message = capsys.readouterr().err
        assert caught.value.code == status and shown in message and message.count("\n") == 1
    with pytest.raises(ValueError, match="a bug"):  # which keeps its traceback
        run_recipe(raises(ValueError("a bug")), Settings, "Test.", right)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:secret@host/db",
        "postgresql://me:se@secret@host/db",
        "postgresql://host/db?password=secret&user=me",
        "host=there password = 'the \\' secret' user=me",
        "https://secret@host",
    ],
)
def test_passwords_of_urls_are_hidden_and_the_rest_is_shown(url: str) -> None:
    shown = hide_passwords(f"at {url} and me@work")
    assert "secret" not in shown and "***" in shown and shown.endswith("and me@work")

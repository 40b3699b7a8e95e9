"""MS MARCO's passage ranking from the Hub: the settings of the recipe, on data sets of the same form and few rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tct_hf.data.beir import load_beir
from tct_hf.pipeline.passage_ranking import PassageRankingFiles, prepare_passage_ranking
from tct_hf.settings import load_settings
from tests.loopback_hub import LoopbackHub
from tests.recipe import ROOT

SETTINGS = ROOT / "recipes" / "msmarco-passage" / "hub" / "data.yaml"
COUNTS = {"train": 600, "validation": 3, "test": 2}


@pytest.fixture
def published(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """BeIR/msmarco and BeIR/msmarco-qrels; the judged queries of each split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    texts, qrels = tmp_path / "texts", tmp_path / "qrels"
    texts.mkdir()
    qrels.mkdir()
    configs = "".join(
        f"- config_name: {n}\n  data_files: [{{split: {n}, path: {n}.jsonl}}]\n" for n in ("corpus", "queries")
    )
    (texts / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    parts = ", ".join(f"{{split: {split}, path: {split}.tsv}}" for split in COUNTS)
    (qrels / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: [{parts}]\n---\n")
    rows = {"corpus": range(700), "queries": range(sum(COUNTS.values()))}
    for name, numbers in rows.items():
        lines = [json.dumps({"_id": str(n), "title": "", "text": f"{name} number {n}"}) + "\n" for n in numbers]
        (texts / f"{name}.jsonl").write_text("".join(lines))
    judged, at = {}, 0
    for split, count in COUNTS.items():
        judged[split] = [str(number) for number in range(at, at + count)]
        at += count
        lines = [f"{query}\t{query}\t1\n" for query in judged[split]]
        (qrels / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(lines))
    hub.publish(texts, "BeIR/msmarco", "datasets")
    hub.publish(qrels, "BeIR/msmarco-qrels", "datasets")
    return judged


def test_the_settings_for_the_hub_read_every_split_and_hold_train_queries_out(
    published: dict[str, list[str]], tmp_path: Path
) -> None:
    text = SETTINGS.read_text().replace("output_dir: outputs/msmarco-passage/data\n", "")
    small = {"8841823": "700", "502939": "600", "532751": "600", "6980": "3", "7437": "3", ": 43": ": 2", "9260": "2"}
    for before, now in small.items():
        assert before in text
        text = text.replace(before, now)
    (tmp_path / "data.yaml").write_text(text)
    source = load_settings(PassageRankingFiles, [str(tmp_path / "data.yaml")], description="")
    counts = prepare_passage_ranking(source, tmp_path / "out", cache_dir=tmp_path / "cache", write=lambda line: None)
    assert counts["passages"] == 700
    queries = {split: set(load_beir(tmp_path / "out", split)[1]) for split in ("train", "tune", "dev", "dl19")}
    assert len(queries["tune"]) == 500 and queries["train"] | queries["tune"] == set(published["train"])
    assert not queries["train"] & queries["tune"]
    assert (queries["dev"], queries["dl19"]) == (set(published["validation"]), set(published["test"]))
    source.splits["dev"].expected_queries = 4
    with pytest.raises(ValueError, match="BeIR/msmarco-qrels::validation: 3 judged queries, but 4 are expected"):
        prepare_passage_ranking(source, tmp_path / "other", cache_dir=tmp_path / "cache")

from __future__ import annotations

from pathlib import Path

import pytest

from tests.encoding.rules import embedding_model
from tests.models import tiny_bert, tiny_distilbert, tiny_modernbert, tiny_mpnet, tiny_roberta


@pytest.fixture(scope="package")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    make = {"mpnet": tiny_mpnet, "distilbert": tiny_distilbert, "modernbert": tiny_modernbert, "roberta": tiny_roberta}
    bert = tiny_bert(root / "bert")
    others = {"clustering": "cluster: ", "query": "old: ", "document": "old: "}
    return {
        **{name: function(root / name) for name, function in make.items()},
        "bert": bert,
        "normalised": embedding_model(root / "normalised", bert),
        "prompted": embedding_model(root / "prompted", bert, prompts=others),
    }

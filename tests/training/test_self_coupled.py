"""A student that is its own teacher: the loss against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tct_hf import TightlyCoupledLoss, build_student
from tct_hf.training.loss import TeacherTargets
from tests.models import tiny_bert
from tests.train_helpers import make_trainer, triples

QUERIES = ["what is a teacher", "dense retrieval", "the student"]
PASSAGES = [["a teacher of students", "retrieval of passages", "the student is a query"], ["of", "a b c", "is"]]


def test_the_self_coupled_loss_equals_plain_torch(tmp_path: Path) -> None:
    student = build_student(str(tiny_bert(tmp_path / "base")))
    student.similarity_fn_name = "cosine"
    student.eval()
    loss = TightlyCoupledLoss(student, temperature=1.0, hard_label_weight=0.4, self_coupled=[6.0, 12.0])
    lexical, mask = torch.rand(3, 6), torch.ones(3, 6, dtype=torch.bool)
    mask[0, 4] = False
    targets = TeacherTargets(scores=lexical, mask=mask, positive_index=torch.tensor([0, 1, -1]))
    features = [student.preprocess(texts) for texts in (QUERIES, *PASSAGES)]
    parts = loss([dict(one) for one in features], targets)

    def read(texts: list[str]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = [student[0].model(**student.tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in texts]
        pooled = torch.stack([torch.nn.functional.normalize(one.mean(0), dim=0) for one in out])
        return pooled, [torch.nn.functional.normalize(one, dim=1) for one in out]

    queries, query_tokens = read(QUERIES)
    passages, passage_tokens = read(PASSAGES[0] + PASSAGES[1])
    cosines = queries @ passages.T
    maxsim = torch.stack([torch.stack([(q @ p.T).amax(1).mean() for p in passage_tokens]) for q in query_tokens])
    hidden = ~mask
    teacher = (lexical + 6 * cosines + 12 * maxsim).detach().masked_fill(hidden, float("-inf")).log_softmax(1)
    of_pooled, of_tokens = ((20 * one).masked_fill(hidden, float("-inf")).log_softmax(1) for one in (cosines, maxsim))
    divergence = torch.where(hidden, 0.0, teacher.exp() * (teacher - of_pooled)).sum(1).mean()
    torch.testing.assert_close(parts["distillation"], 0.6 * divergence, atol=1e-5, rtol=1e-4)
    for name, scores in (("hard_label", of_pooled), ("token_hard_label", of_tokens)):
        torch.testing.assert_close(parts[name], -0.4 * (scores[0, 0] + scores[1, 1]) / 2, atol=1e-5, rtol=1e-4)


def test_what_self_coupling_can_not_do_is_refused_when_the_trainer_is_built(
    student: Any, teacher: Any, sparse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = TightlyCoupledLoss(student, self_coupled=[6.0, 12.0])
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "num_processes", 2)  # that have met after the loss was made
        with pytest.raises(ValueError, match="train a dense student, in one process"):
            make_trainer(tmp_path / "run", student, teacher, triples(8), loss=loss)
    make_trainer(tmp_path / "run", student, teacher, triples(8), loss=loss)
    loss.mini_batch_size = 2
    with pytest.raises(ValueError, match="leave out mini_batch_size"):
        make_trainer(tmp_path / "run", student, teacher, triples(8), loss=loss)
    with pytest.raises(ValueError, match="train a dense student, in one process"):
        TightlyCoupledLoss(sparse, self_coupled=[6.0, 12.0])

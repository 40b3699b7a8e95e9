"""Check a trained model, write its card, and push it to the Hub with its figures and its recipe.

python recipes/release.py --path outputs/quickstart/student --repo_id me/my-student --license apache-2.0 [--dry_run]

With --onnx and --openvino, graphs for servers go along (docs/hub.md).

With --space owner/name, a page that searches --data.source with the student is pushed to a Space beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tct_hf.pipeline.settings import DataSettings
from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    path: str | None = setting(None, "folder of the student, teacher or sparse student")
    repo_id: str | None = setting(None, "owner/name on the Hub")
    output_dir: str = setting("outputs/release", "folder of the files to push; only an earlier release is replaced")
    report: str | None = setting(None, "folder or report.json of an evaluation of this model")
    recipe: str | None = setting(None, "settings.yaml of the training; the one beside the model when null")
    card: str | None = setting(None, "model card file to use instead of the template")
    license: str | None = setting(None, "licence identifier known to the Hub, such as apache-2.0")
    license_note: str | None = setting(None, "note on the licence of weights or data")
    base_model: str | None = setting(None, "Hub id of the initial encoder; as recorded when null")
    teacher: str | None = setting(None, "Hub id or name of the teacher")
    training_data: str | None = setting(None, "description of the training data; as recorded when null")
    datasets: list[str] = setting([], "Hub ids of the training data")
    language: list[str] = setting([], "ISO language codes")
    limits: list[str] = setting([], "further limitations for the card, a sentence each")
    private: bool | None = setting(None, "whether a new repository is private; the account's setting when null")
    revision: str = setting("main", "branch to push to")
    tag: str | None = setting(None, "tag of the commit, such as v1.0")
    message: str | None = setting(None, "commit message")
    dry_run: bool = setting(False, "check and write everything, push nothing")
    onnx: bool = setting(False, "add the student as an ONNX graph (extra: onnx)")
    openvino: bool = setting(False, "add the student as an OpenVINO graph (extra: openvino)")
    int8: bool = setting(False, "add these graphs in int8, too")
    int8_dev: bool = setting(False, "measure these on the dev split of data.source, for the card")
    space: str | None = setting(None, "owner/name of a Space to search data.source with the student (extra: demo)")
    data: DataSettings = field(default_factory=DataSettings)  # of the Space and of int8_dev


def main(settings: Settings) -> None:
    from tct_hf import release
    from tct_hf.hub.cards import CardFacts
    from tct_hf.progress import quieten

    given = dict(vars(settings))
    data = given.pop("data")
    path, repo_id, folder = (given.pop(name) for name in ("path", "repo_id", "output_dir"))
    if path is None or repo_id is None:
        raise SettingsError("path, repo_id: must be given, --path FOLDER --repo_id owner/name")
    quieten()
    print(f"{path}: checking the vectors in a fresh interpreter", flush=True)
    facts = CardFacts(**{name: given.pop(name) for name in CardFacts.__dataclass_fields__ if name in given})
    if settings.space is not None or settings.int8_dev:
        from tct_hf.pipeline.data import read_collection

        given["collection"] = read_collection(data, train=False, test=False)
    done = release(path, repo_id, facts=facts, folder=folder, **given)
    pushed = "to be pushed" if settings.dry_run else "pushed"
    rows = {pushed: done.sent, "there already": done.unchanged, "no part of the release": done.left_out}
    print("\n| file | |\n|---|---|")
    print("\n".join(f"| {name} | {what} |" for what, names in rows.items() for name in names))
    if settings.dry_run:
        print(f"\nNothing was pushed. Read {done.folder}/README.md, then run it again without --dry_run.")
    else:
        print(f"\n{done.url}\ncommit {done.commit}{f', tag {done.tag}' if done.tag else ''}\n\n{done.loading()}")
        if done.space_url:
            print(f"\n{done.space_url}")


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)

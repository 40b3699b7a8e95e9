"""Check a trained model, write its card, and push it to the Hub with its figures and its recipe.

python recipes/release.py --path outputs/quickstart/student --repo_id me/my-student --license apache-2.0 --dry_run

With --dry_run everything is checked and written to --output_dir, and nothing is pushed. Run again, it pushes what has
changed. --report takes the folder of recipes/evaluate.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from tct_hf.settings import SettingsError, run_recipe, setting


@dataclass
class Settings:
    path: str | None = setting(None, "folder of the student, teacher or sparse student")
    repo_id: str | None = setting(None, "owner/name on the Hub")
    output_dir: str = setting(
        "outputs/release", "where what is pushed is kept; only an earlier release there is replaced"
    )
    report: str | None = setting(None, "folder or report.json of an evaluation of this model")
    recipe: str | None = setting(None, "settings.yaml of the training; none: the one beside the model")
    card: str | None = setting(None, "a written card in place of the template")
    license: str | None = setting(None, "identifier of the Hub's list, such as apache-2.0")
    license_note: str | None = setting(None, "what a reader must know of the licence of weights or data")
    base_model: str | None = setting(None, "Hub id of the encoder that training began with; none: of the training")
    teacher: str | None = setting(None, "Hub id or name of the teacher")
    training_data: str | None = setting(None, "what it was trained on, in words; none: of the training")
    datasets: list[str] = setting([], "Hub ids of the training data")
    language: list[str] = setting([], "ISO codes")
    limits: list[str] = setting([], "more limits for the card, a sentence each")
    private: bool | None = setting(None, "of a repository that is made; none: the account's setting")
    revision: str = setting("main", "branch to push to")
    tag: str | None = setting(None, "of the commit, such as v1.0")
    message: str | None = setting(None, "of the commit")
    dry_run: bool = setting(False, "check and write everything, push nothing")


def main(settings: Settings) -> None:
    from tct_hf import release
    from tct_hf.hub.cards import CardFacts
    from tct_hf.progress import quieten

    for name in ("path", "repo_id"):
        if getattr(settings, name) is None:
            raise SettingsError(f"{name}: must be given, --{name} {'FOLDER' if name == 'path' else 'owner/name'}")
    quieten()
    print(f"{settings.path}: checking the vectors in a fresh interpreter", flush=True)
    done = release(
        str(settings.path),
        str(settings.repo_id),
        facts=CardFacts(
            license=settings.license,
            base_model=settings.base_model,
            training_data=settings.training_data,
            teacher=settings.teacher,
            datasets=settings.datasets,
            language=settings.language,
            limits=settings.limits,
            license_note=settings.license_note,
        ),
        report=settings.report,
        recipe=settings.recipe,
        card=settings.card,
        private=settings.private,
        revision=settings.revision,
        tag=settings.tag,
        dry_run=settings.dry_run,
        folder=settings.output_dir,
        message=settings.message,
    )
    rows = [(name, "to be pushed" if settings.dry_run else "pushed") for name in done.sent]
    rows += [(name, "there already") for name in done.unchanged]
    rows += [(name, "no part of the release") for name in done.left_out]
    print("\n| file | |\n|---|---|\n" + "\n".join(f"| {name} | {what} |" for name, what in rows))
    if settings.dry_run:
        print(f"\nNothing was pushed. Read {done.folder}/README.md, then run it again without --dry_run.")
        return
    print(f"\n{done.url}\ncommit {done.commit}{f', tag {done.tag}' if done.tag else ''}\n\n{done.loading()}")


if __name__ == "__main__":
    run_recipe(main, Settings, __doc__)

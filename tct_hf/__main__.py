"""The recipes as one command: `tct-hf train quickstart`, or `accelerate launch -m tct_hf train quickstart`.

tct-hf COMMAND [SETTINGS] [--setting value ...]   run a recipe with a YAML file, or one that `tct-hf list` names
tct-hf COMMAND --help                             its settings
tct-hf list                                       the commands and the settings that come with tct_hf
tct-hf copy FOLDER                                copy the recipes into a new folder, to change them
"""

from __future__ import annotations

import ast
import runpy
import shutil
import sys
from difflib import get_close_matches
from pathlib import Path


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, beside the package in a source tree."""
    here = Path(__file__).resolve().parent
    return next(folder for folder in (here / "recipes", here.parent / "recipes") if folder.is_dir())


def named_settings(recipes: Path) -> dict[str, Path]:
    """The YAML files that come along, by their path below the recipes without the suffix."""
    files = sorted(recipes.rglob("*.yaml"))
    return {
        file.relative_to(recipes).with_suffix("").as_posix(): file
        for file in files
        if file.parent.name != "accelerate"
    }


def main() -> None:
    """Run the command that the process was started with."""
    recipes = recipes_folder()
    commands = {file.stem.replace("_", "-"): file for file in sorted(recipes.glob("*.py"))}
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(f"{__doc__}\nCommands: {', '.join(commands)}")
    elif command == "list":
        for name, script in commands.items():
            says = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
            print(f"{name:15} {says.splitlines()[0]}")
        print("\nSettings: " + ", ".join(named_settings(recipes)))
    elif command == "copy":
        if len(words) != 1 or Path(words[0]).exists():
            sys.exit("tct-hf copy: name one new folder, such as tct-hf copy my-recipes")
        shutil.copytree(recipes, words[0], ignore=shutil.ignore_patterns("__pycache__"))
        print(f"Run one with: accelerate launch {words[0]}/train.py {words[0]}/quickstart.yaml")
    elif (command := command.replace("_", "-")) not in commands:
        sys.exit(f"tct-hf: there is no command {command!r}; choose from {', '.join([*commands, 'list', 'copy'])}")
    else:
        if words and not words[0].startswith("-") and not Path(words[0]).exists():
            named = named_settings(recipes)
            if words[0] not in named and not words[0].endswith((".yaml", ".yml")):
                near = get_close_matches(words[0], named, n=1)
                meant = f"Did you mean {near[0]}? " if near else ""
                sys.exit(f"tct-hf {command}: there are no settings {words[0]!r}. {meant}`tct-hf list` names all.")
            words[0] = str(named.get(words[0], words[0]))
        sys.argv = [str(commands[command]), *words]
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

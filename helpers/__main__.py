"""The command line: python -m helpers COMMAND; `python -m helpers --help` lists the commands."""

import argparse
import json
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from helpers.names import unknown

EXAMPLES = {
    "train": "python -m helpers train pocket --set grpo.steps=50 seed=1 --out runs/short",
    "evaluate": "python -m helpers evaluate runs/pocket@sft runs/pocket@grpo --temperature 1",
    "chat": "python -m helpers chat runs/pocket",
    "results": "python -m helpers results runs/pocket",
    "datagen": "python -m helpers datagen syllogism --size 200 --out runs/traces.jsonl",
    "benchmark": "python -m helpers benchmark --quick",
    "ablation": "python -m helpers ablation --out runs/ablation --workers 2",
    "recipes": "python -m helpers recipes",
    "set-repository": "python -m helpers set-repository ada/rlvr",
}


def parser() -> argparse.ArgumentParser:
    """All commands and their options; each one's help ends with an example."""
    top = argparse.ArgumentParser(prog="python -m helpers", description="Teach a small language model to reason.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, about: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter  # keeps the example on one line, to be copied
        return commands.add_parser(
            name, help=about, description=about, epilog=f"example: {EXAMPLES[name]}", formatter_class=raw
        )

    train = command("train", "Run a recipe: base -> warm-up -> GRPO, each evaluated on held-out questions.")
    train.add_argument("recipe", help="a name that `recipes` lists")
    train.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="settings",
                       help="change settings of the recipe")  # fmt: skip
    train.add_argument("--resume", action="store_true", help="go on with the run in --out, with its own settings")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/RECIPE)")

    evaluate = command("evaluate", "Accuracy with its interval beside the constant answer; two targets: a paired test.")
    what = "a run's folder, FOLDER@STAGE, or a model's name"
    evaluate.add_argument("targets", nargs="+", metavar="TARGET", help=what)
    chat = command("chat", "Ask a model. An empty line asks a held-out question; end with Ctrl-D.")
    chat.add_argument("target", metavar="TARGET", help=what)
    for some in (evaluate, chat):
        some.add_argument("--adapter", type=Path, help="a LoRA adapter to put on a named model")
        some.add_argument("--task", help="the task of the held-out questions (default: the run's, else syllogism)")
        some.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
        some.add_argument("--max-new-tokens", type=int, default=300)
        some.add_argument("--seed", type=int, default=0, help="of the sampling")
    evaluate.add_argument("--size", type=int, default=300, help="held-out questions")
    evaluate.add_argument("--questions", type=int, default=0, metavar="DRAW",
                          help="another number draws other held-out questions; 0: those of `train`")  # fmt: skip
    evaluate.add_argument("--samples", type=int, default=1, help="responses a question, for pass@k")
    evaluate.add_argument("--unbalanced", action="store_true", help="the task's stock mix of answers")
    evaluate.add_argument("--out", type=Path, help="a new JSON Lines file for every answer to every question")

    results = command("results", "A table of the accuracies that runs have logged, and what GRPO changed in each.")
    results.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder")
    datagen = command("datagen", "Write warm-up traces that the verifier accepts: by the offline teacher or an API.")
    datagen.add_argument("task", metavar="TASK", help="the task of the training questions")
    datagen.add_argument("--out", type=Path, required=True, help="a JSON Lines file; what it has is not written again")
    datagen.add_argument("--size", type=int, default=200, help="questions")
    datagen.add_argument("--seed", type=int, default=0, help="of the questions: the seed of the run that will use them")
    datagen.add_argument("--unbalanced", action="store_true", help="the task's stock mix of answers")
    # The names of ApiConfig's fields; what is not given here keeps the default it has there.
    api = datagen.add_argument_group("an OpenAI-compatible API, its key in the environment as OPENAI_API_KEY")
    api.add_argument("--api-model", nargs="?", const="gpt-4.1-mini", dest="model", help="gpt-4.1-mini if not named")
    api.add_argument("--base-url", help="of another server, as in http://localhost:8000/v1")
    api.add_argument("--concurrency", type=int, help="open requests at most (default: 50)")
    api.add_argument("--attempts", type=int, help="replies one question may cost, all sessions together (default: 3)")
    api.add_argument("--max-retries", type=int, help="of a request without a reply (default: 5)")
    api.add_argument("--timeout", type=float, help="seconds without a reply (default: 60)")
    api.add_argument("--max-tokens", type=int, help="of a reply (default: 600)")
    api.add_argument("--temperature", type=float, help="(default: 0.7)")
    api.add_argument("--prices", type=float, nargs=2, metavar=("IN", "OUT"), help="USD for a million tokens")
    benchmark = command("benchmark", "Time rollouts and steps against transformers, TRL and the machine's own limit.")
    benchmark.add_argument("--quick", action="store_true", help="bfloat16 alone, one repeat; under 2 minutes")
    benchmark.add_argument("--json", type=Path, metavar="FILE", help="keep all numbers, and the figure beside them")
    benchmark.add_argument("--threads", type=int, help="of the CPU (default: torch's choice)")
    ablation = command("ablation", "Train the pocket model with one setting changed at a time, on several seeds.")
    ablation.add_argument("--out", type=Path, required=True, help="a folder; what it has is not run again")
    ablation.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    ablation.add_argument("--variants", nargs="+", metavar="NAME", help="some of them (default: all)")
    ablation.add_argument("--workers", type=int, default=1, help="runs at a time, one CPU core each")
    ablation.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="settings",
                          help="change settings of the recipe for all")  # fmt: skip
    command("recipes", "List the recipes and the models.")
    about = "Write the project's address on GitHub into the notebooks, for Colab: after a fork or a change of helpers/."
    repository = command("set-repository", about)
    repository.add_argument("repository", metavar="OWNER/NAME", nargs="?", help="(default: what it is now)")
    return top


def load_target(target: str, adapter: Path | None = None):
    """Model, tokenizer and task name (None if it has none) of a run's folder, FOLDER@STAGE or a model's name."""
    import torch

    from helpers.decoder import sampling_copy
    from helpers.models import load_adapter, load_model
    from helpers.pipeline import start_model
    from helpers.recipes import Recipe, build
    from helpers.runs import STAGES, Run

    folder, _, stage = target.partition("@")
    if (Path(folder) / "config.yaml").is_file():
        if stage and stage not in STAGES:
            raise ValueError(unknown("stage", stage, STAGES))
        if adapter:
            raise ValueError("--adapter goes on a named model; a run's folder has weights of its own.")
        run = Run.open(folder)
        recipe = build(Recipe, run.config["recipe"])
        model, tokenizer = start_model(recipe)
        if run.load_weights(model, stage or None) is None:
            raise ValueError(f"{folder} has no checkpoint{f' of stage {stage}' if stage else ''} yet.")
        model.eval()
        if recipe.sampler_dtype:  # what the run itself samples and evaluates with
            model = sampling_copy(model, getattr(torch, recipe.sampler_dtype))
        return model, tokenizer, recipe.task
    if Path(folder).exists():
        raise ValueError(f"{folder} holds no run: it has no config.yaml.")
    model, tokenizer = load_model(target)
    return (load_adapter(model, adapter) if adapter else model), tokenizer, None


def run_train(args: argparse.Namespace) -> None:
    """`train`."""
    from helpers.pipeline import train
    from helpers.recipes import load_recipe

    if args.resume and args.settings:
        raise ValueError("--resume goes on with the run's own settings; leave out --set, or start anew.")
    recipe = load_recipe(args.recipe, args.settings)
    out = args.out or Path("runs") / args.recipe
    try:
        train(recipe, out, resume=args.resume)
    except KeyboardInterrupt:
        again = f"python -m helpers train {args.recipe} --resume" + (f" --out {args.out}" if args.out else "")
        print(f"\nStopped. The last checkpoint is kept; go on with: {again}", file=sys.stderr)
        raise SystemExit(130) from None


def run_evaluate(args: argparse.Namespace) -> None:
    """`evaluate`."""
    from helpers.evaluate import evaluate, mcnemar, report
    from helpers.runs import write_atomically
    from helpers.tasks import load_task

    if args.out:
        if args.out.exists():
            raise ValueError(f"{args.out} exists: choose another --out, or delete it.")
        args.out.parent.mkdir(parents=True, exist_ok=True)  # now, not when the work is done
    results, answers = [], []
    for target in args.targets:
        model, tokenizer, name = load_target(target, args.adapter)
        name = args.task or name or "syllogism"
        task = load_task(name, "test", args.size, seed=args.questions, balanced=not args.unbalanced)
        result = evaluate(
            model, tokenizer, task, temperature=args.temperature, samples=args.samples,
            max_new_tokens=args.max_new_tokens, seed=args.seed,
        )  # fmt: skip
        results.append((name, result))
        answers += [{"target": target, **record} for record in result.records]
        summary = result.summary()
        print(f"{target} on {name}: {report(summary)}")
        if args.samples > 1:
            print("  " + ", ".join(f"pass@{k} {100 * v:.1f} %" for k, v in summary["pass_at_k"].items()))
        if summary["balanced_accuracy"] is not None:
            shares = ", ".join(f"{a!r} {100 * share:.0f} %" for a, share in summary["answers"].items())
            print(f"  balanced accuracy {100 * summary['balanced_accuracy']:.1f} %; answers: {shares}")
    if args.out:
        write_atomically(args.out, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    # Several responses to one question are not independent, so the test is for one each.
    if len(results) == 2 and results[0][0] == results[1][0] and args.samples == 1:
        test = mcnemar(results[0][1].right, results[1][1].right)
        print(f"second against first: {test['gained']} gained, {test['lost']} lost; McNemar p = {test['p']:.2g}")


def run_chat(args: argparse.Namespace) -> None:
    """`chat`."""
    from helpers.rollout import encode_prompt, end_token_ids, rollout
    from helpers.tasks import load_task

    model, tokenizer, name = load_target(args.target, args.adapter)
    task = load_task(args.task or name or "syllogism", "test", 300)
    ends = end_token_ids(model, tokenizer)
    if sys.stdin.isatty():
        print("Type a question, or nothing for a held-out one. Ctrl-D ends.")
    for number, line in enumerate(sys.stdin):
        question, truth = line.strip(), None
        if not question:
            example = task[number % len(task)]
            question, truth = example.question, example.answer
            print(question)
        [[response]] = rollout(
            model, [encode_prompt(tokenizer, question)], group_size=1, max_new_tokens=args.max_new_tokens,
            end_ids=ends, temperature=args.temperature, seed=args.seed + number,
        )  # fmt: skip
        print(tokenizer.decode(response.token_ids, skip_special_tokens=True))
        print(f"(true answer: {truth})\n" if truth else "", flush=True)


def run_results(args: argparse.Namespace) -> None:
    """`results`."""
    from helpers.pipeline import compare, results_table
    from helpers.runs import Run

    print(results_table(args.folders))
    for folder in args.folders:
        run = Run.open(folder)
        for decoding in ("greedy", "sampled"):
            stages = [e["stage"] for e in run.records("eval") if e["decoding"] == decoding]
            if "grpo" in stages[1:]:  # against the warm-up, or where a run had none, the model as it came
                print(f"\n{run.folder.name}: {compare(run, *stages[-2:], decoding)}", end="")
    print()


def run_datagen(args: argparse.Namespace) -> None:
    """`datagen`."""
    from helpers.datagen import ApiConfig, make_traces
    from helpers.tasks import load_task

    given = {f.name: getattr(args, f.name) for f in fields(ApiConfig) if getattr(args, f.name) is not None}
    if given and not given.keys() & {"model", "base_url"}:
        option = next(iter(given)).replace("_", "-")
        raise ValueError(f"--{option} is for an API; add --api-model or --base-url.")
    task = load_task(args.task, "train", args.size, args.seed, balanced=not args.unbalanced)
    try:
        print(make_traces(task, args.out, ApiConfig(**given) if given else None))
    except KeyboardInterrupt:
        print(f"\nStopped. What is in {args.out} is kept; the same command goes on from there.", file=sys.stderr)
        raise SystemExit(130) from None


def run_benchmark(args: argparse.Namespace) -> None:
    """`benchmark`."""
    import json

    import torch

    from helpers.benchmark import Job, benchmark, profile_table, table
    from helpers.plots import benchmark_bars
    from helpers.runs import write_atomically

    say = partial(print, file=sys.stderr, flush=True)
    result = benchmark(Job(threads=args.threads or torch.get_num_threads()), quick=args.quick, say=say)
    print(table(result))
    if result["profile"]:
        print(f"\n{profile_table(result)}")
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=1))
        benchmark_bars(result).savefig(args.json.with_suffix(".png"))
        print(f"Kept in {args.json} and {args.json.with_suffix('.png')}.", file=sys.stderr)


def run_ablation(args: argparse.Namespace) -> None:
    """`ablation`."""
    from helpers.ablation import VARIANTS, ablate, ablation_table

    if args.seeds < 1 or args.workers < 1:
        raise ValueError("--seeds and --workers are 1 or more.")
    try:
        records = ablate(args.out, range(args.seeds), args.variants or tuple(VARIANTS), args.workers,
                         settings=args.settings, say=partial(print, file=sys.stderr, flush=True))  # fmt: skip
    except KeyboardInterrupt as stop:
        print(f"\n{stop}", file=sys.stderr)
        raise SystemExit(130) from None
    print(ablation_table(records))


def run_recipes(args: argparse.Namespace) -> None:
    """`recipes`."""
    from helpers.models import MODELS
    from helpers.recipes import load_recipe, recipe_names

    for name in recipe_names():
        print(f"{name:22} {load_recipe(name).about}")
    print("\nModels:")
    for name, card in MODELS.items():
        print(f"{name:22} {card.about}")


def run_set_repository(args: argparse.Namespace) -> None:
    """`set-repository`."""
    from helpers.colab import REPOSITORY, set_repository

    repository = args.repository or REPOSITORY
    changed = set_repository(repository)
    print(f"{repository}: {', '.join(changed) or 'nothing had to be changed'}")


def main(argv: list[str] | None = None) -> int:
    """Run a command. What the reader got wrong is one sentence on stderr and exit code 2."""
    args = parser().parse_args(argv)
    commands = (run_train, run_evaluate, run_chat, run_results, run_datagen, run_benchmark, run_ablation, run_recipes,
                run_set_repository)  # fmt: skip
    try:
        {run.__name__.removeprefix("run_").replace("_", "-"): run for run in commands}[args.command](args)
    except (ValueError, RuntimeError, OSError) as error:
        if "\n" in str(error):  # not one of our own sentences: the place in the code matters
            raise
        print(f"helpers: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

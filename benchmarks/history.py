"""The history of the speed: measures commits, keeps the results on a branch of their own, and publishes their pages.

``python benchmarks/history.py`` measures what is new since the last commit that was measured, on whatever machine (at
first the last commit alone), commits the results to the branch benchmark-results, and writes pages to
docs/_build/html/benchmarks, beside the documentation. A range of git's, such as HEAD~10..HEAD or HEAD^!, chooses other
commits. Each machine has curves of its own. Push the branch to share it: a clone goes on with the one of its remote.
"""

import subprocess
import sys
from pathlib import Path

import click

HERE = Path(__file__).resolve().parent
SOME_FAILED = 2  # what asv ends with then
BRANCH, RESULTS, PAGES = "benchmark-results", HERE / ".asv" / "results", HERE.parent / "docs" / "_build" / "html"


def git(*arguments, cwd=HERE):
    """What git says."""
    return subprocess.check_output(["git", *arguments], cwd=cwd, text=True).strip()  # noqa: S607, the git at hand


def asv(*arguments):
    """Run asv here; whether every benchmark ran."""
    done = subprocess.run([sys.executable, "-m", "asv", *arguments], cwd=HERE)
    if done.returncode not in (0, SOME_FAILED):
        raise click.ClickException(f"asv {arguments[0]} has ended with {done.returncode}")
    return done.returncode == 0


def check_out():
    """Make the results' folder the branch of results: ours, else a remote's, else a new one."""
    if (RESULTS / ".git").exists():
        return
    if RESULTS.exists():
        raise click.ClickException(f"{RESULTS} is not the branch {BRANCH}: move it away")
    if not git("branch", "--list", BRANCH) and (there := git("branch", "--remotes", "--list", f"*/{BRANCH}")):
        git("branch", "--track", BRANCH, there.split()[0])
    if not git("branch", "--list", BRANCH):
        nothing = git("hash-object", "-t", "tree", "/dev/null")
        git("branch", BRANCH, git("commit-tree", nothing, "-m", "Results of the benchmarks"))
    git("worktree", "prune")
    git("worktree", "add", "-f", str(RESULTS), BRANCH)


def keep(commits):
    """Commit what the results' folder holds."""
    git("add", "--all", cwd=RESULTS)
    if git("status", "--porcelain", cwd=RESULTS):
        git(
            "commit", "--no-verify", "-m", f"Results of {commits} at {git('rev-parse', '--short', 'HEAD')}", cwd=RESULTS
        )


def new_commits():
    """What is to be measured where nobody says, as asv is told; None where nothing is new."""
    measured = {path.name.partition("-")[0] for path in RESULTS.glob("*/*-*.json")}
    if not measured:
        return "HEAD^!"
    known = [commit for commit in git("rev-list", "HEAD").split() if commit[:8] in measured]
    return "NEW" if git("rev-list", "HEAD", "--not", *known) else None


@click.command()
@click.argument("commits", required=False)
@click.option("--bench", help="A regular expression of benchmarks; by default all.")
@click.option("--quick", is_flag=True, help="Once each, to see that they work: nothing is kept or published.")
def main(commits, bench, quick):
    """Measure COMMITS, keep the results, publish."""
    chosen = ["--bench", bench] if bench else []
    asv("machine", "--yes")
    if quick:
        sys.exit(0 if asv("run", "--quick", "--dry-run", *chosen, commits or "HEAD^!") else SOME_FAILED)
    check_out()
    if (commits := commits or new_commits()) is None:
        click.echo("nothing is new since the last commit that was measured")
        whole = True
    else:
        whole = asv("run", "--skip-existing", *chosen, commits)
        keep(commits)
    asv("publish", "--html-dir", str(PAGES / "benchmarks"))
    click.echo(f"{PAGES / 'benchmarks' / 'index.html'}; the results are on the branch {BRANCH}")
    if not whole:
        click.echo("some benchmarks failed; the others are kept", err=True)
        sys.exit(SOME_FAILED)


if __name__ == "__main__":
    main()

"""Say the last word on a run that `mlflow run` launched.

`mlflow run` closes its run when the command has ended, as FINISHED or FAILED, whatever status the command gave it:
in MLflow 3.17 it asks whether the run is closed with a text where a number is wanted. So what must stand in the end,
KILLED after Ctrl-C, or no run at all where a study went on in another one, is written by a small process that
outlives the command by a few seconds.
"""

import subprocess
import sys
import time

PATIENCE = 60.0  # seconds that `mlflow run` may take to close the run


def after_mlflow_run(run_id: str, outcome: str) -> None:
    """Give the run its `outcome`, KILLED or deleted, once `mlflow run` has closed it. Returns at once."""
    subprocess.Popen(
        [sys.executable, "-m", "signdigits.settle", run_id, outcome],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the Ctrl-C that ends the command is not for this one
    )


def settle(run_id: str, outcome: str) -> None:
    """Wait until `mlflow run` has closed the run, then write its outcome.

    Does nothing if it is not closed within `PATIENCE`, nor to a KILLED run that somebody goes on with meanwhile.
    """
    from mlflow import MlflowClient

    client, deadline = MlflowClient(), time.monotonic() + PATIENCE
    waiting = "RUNNING" if outcome == "deleted" else "KILLED"
    while (status := client.get_run(run_id).info.status) == waiting and time.monotonic() < deadline:
        time.sleep(0.2)
    if outcome == "deleted" and status != waiting:
        client.delete_run(run_id)  # softly: `mlflow runs restore` brings it back
    elif outcome == "KILLED" and status == "FAILED":
        client.set_terminated(run_id, "KILLED")


if __name__ == "__main__":
    settle(*sys.argv[1:])

"""`slao doctor`: what this machine has, which backend each op takes, and whether every kernel here is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import output

if TYPE_CHECKING:
    from slao_kernels.environment import Choice
    from slao_kernels.selftest import Check

DOCTOR = """
  slao doctor
  slao doctor --json | jq '.checks[] | select(.passed | not)'
"""


def doctor(json: output.Json = False) -> int:
    """Versions, devices, the backend of each op and why, and every kernel against fp64 on this machine.

    Each op runs on each backend that serves it here, in fp32, bf16, fp16 and
    fp64, gradients too. An error is RMS(x - ref) / RMS(ref), unless the result's
    name says otherwise; its bound is the one that the tests hold the kernel to.
    Exit code 1 if one is beyond its bound, or if SLAO_KERNELS_BACKEND asks for
    what cannot be had.

    With --json: versions; devices (type: what); backends (each with device, op,
    backend, problem, others: why not them); checks (each with op, backend,
    device, dtype, result: the one nearest to its bound, error, bound, problem,
    run, passed); passed.
    """
    with output.aside(json):
        from slao_kernels import environment, selftest

        devices = environment.devices()
        choices = {device: environment.choices(device) for device in devices}
        console = None if json else output.terminal()
        if not json and console is None:
            print(environment.describe(), end="\n\n")
        elif console is not None:
            _show_machine(environment.versions(), devices, choices)
        checks = list(selftest.checks())
    passed = all(check.passed for check in checks) and all(one.backend for each in choices.values() for one in each)
    if json:
        backends = [{"device": device, **vars(choice)} for device, each in choices.items() for choice in each]
        told = [{**vars(check), "passed": check.passed} for check in checks]
        start = {"versions": environment.versions(), "devices": devices, "backends": backends}
        output.document({**start, "checks": told, "passed": passed})
        return 0 if passed else 1
    lines = _verdicts(checks)
    if console is None:
        print("\n".join(lines))
    else:
        for line in lines:
            console.print(line, style="bold red" if "FAILED" in line else None, soft_wrap=False)
    return 0 if passed else 1


def _show_machine(versions: dict[str, str], devices: dict[str, str], choices: dict[str, list[Choice]]) -> None:
    from rich.table import Table

    console = output.terminal()
    assert console is not None
    console.print("\n".join(f"{name:<14}{version}" for name, version in versions.items()))
    for device, what in devices.items():
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in ("op", "takes", "the others"):
            table.add_column(title)
        for choice in choices[device]:
            table.add_row(choice.op, choice.backend or "nothing", choice.reasons())
        console.print(f"\n{device}: {what}", style="bold")
        console.print(table)
    console.print()


def _verdicts(checks: list[Check]) -> list[str]:
    """A line for each op on each backend: the dtype that is nearest to its bound, or every one that is beyond; and a
    line for all."""
    kernels: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        kernels.setdefault((check.device, check.op, check.backend), []).append(check)
    lines = ["every kernel against fp64, by the dtype and result that is nearest to its bound:"]
    for (device, op, backend), each in sorted(kernels.items()):
        wrong, ran = [check for check in each if not check.passed], [check for check in each if check.run]
        for check in wrong or sorted(ran, key=lambda check: check.part)[-1:]:
            said = check.problem or f"{check.result} {check.error:.1e} of {check.bound:.1e}"
            lines.append(f"{device:<5}{op:<16}{backend:<10}{'FAILED' if wrong else 'ok':<8}{check.dtype} {said}")
        if missed := [check.dtype for check in each if not check.run]:
            lines.append(f"{device:<5}{op:<16}{backend:<10}not run {', '.join(missed)}: no time was left")
    count = sum(not check.passed for check in checks)
    left = sum(not check.run for check in checks)
    total = f"{len(checks) - left} checks of {len(kernels)} kernels" + (f", {left} not run" if left else "")
    return [*lines, f"{total}: {f'{count} FAILED' if count else 'all within their bounds'}"]

"""Stream "clinc150": real user requests, 150 intents in 10 domains; one task a domain.

Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019,
https://github.com/clinc/oos-eval, Creative Commons Attribution 3.0. An intent has 100 train, 20 validation and
30 test rows, so a task has 1,500, 300 and 450. Out-of-scope rows are left out. The splits are the published ones:
two of the 15,000 training texts stand in the test split too, and three in the validation split.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slao.reading import read_json
from slao.streams.base import Row, Splits, Stream
from slao.streams.hub import loader

INSTRUCTION = "What is the intent of the following request? Choose one from the options."
HUB_ID, HUB_CONFIG = "clinc/clinc_oos", "plus"  # "plus" holds every in-scope row; it adds out-of-scope ones only

# The hub's rows carry no domain; this is domains.json of the data set, in its order.
DOMAINS = {
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate min_payment "
    "bill_balance transfer order_checks balance spending_history transactions report_fraud",
    "credit_cards": "replacement_card_duration expiration_date damaged_card improve_credit_score report_lost_card "
    "card_declined credit_limit_change apr redeem_rewards credit_limit rewards_balance application_status "
    "credit_score new_card international_fees",
    "kitchen_and_dining": "food_last confirm_reservation how_busy ingredients_list calories nutrition_info recipe "
    "restaurant_reviews restaurant_reservation meal_suggestion restaurant_suggestion cancel_reservation "
    "ingredient_substitution cook_time accept_reservations",
    "home": "what_song play_music todo_list_update reminder reminder_update calendar_update order_status "
    "update_playlist shopping_list calendar next_song order todo_list shopping_list_update smart_home",
    "auto_and_commute": "current_location oil_change_when oil_change_how uber traffic tire_pressure "
    "schedule_maintenance gas mpg distance directions last_maintenance gas_type tire_change jump_start",
    "travel": "plug_type travel_notification translate flight_status international_visa timezone exchange_rate "
    "travel_suggestion travel_alert vaccines lost_luggage book_flight book_hotel carry_on car_rental",
    "utility": "weather alarm date find_phone share_location timer make_call calculator definition "
    "measurement_conversion flip_coin spelling time roll_dice text",
    "work": "pto_request_status next_holiday insurance_change insurance meeting_schedule payday taxes income "
    "rollover_401k pto_balance pto_request w2 schedule_meeting direct_deposit pto_used",
    "small_talk": "who_made_you meaning_of_life who_do_you_work_for do_you_have_pets what_are_your_hobbies fun_fact "
    "what_is_your_name where_are_you_from goodbye thank_you greeting tell_joke are_you_a_bot how_old_are_you "
    "what_can_i_ask_you",
    "meta": "change_speed user_name whisper_mode yes change_volume no change_language repeat change_accent cancel "
    "sync_device change_user_name change_ai_name reset_settings maybe",
}

Example = tuple[str, str]  # (text, intent)


def clinc150(
    path: str | Path | None = None,
    seed: int = 0,
    fraction: float = 1.0,
    domains: Sequence[str] | None = None,
    parts: int = 1,
    load: Callable[..., Any] | None = None,
) -> Stream:
    """Ten tasks, the domains, in the order of the data set's table; the labels of a task are its 15 intents.

    path: a folder with data_full.json and domains.json of the data set; without it the rows come from the hub.
    fraction: share of each intent's training rows to keep, drawn from `seed`; validation and test stay whole.
    domains: only these, in this order. parts: each domain's rows make so many tasks in a row that share its labels
    ("banking 1", "banking 2"): the most related tasks there can be.
    load: stands in for `datasets.load_dataset`, say with a pinned revision; used only without `path`.

    ValueError: a file is absent or malformed, an intent has no domain, an unknown domain, or a number out of range.
    ImportError: no path and no `datasets`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    if parts < 1:
        raise ValueError(f"parts must be at least 1, not {parts}")
    known, splits = _from_hub(load) if path is None else _from_folder(Path(path))
    domain_of = {intent: domain for domain, intents in known.items() for intent in intents}
    chosen = list(known) if domains is None else list(domains)
    if unknown := [domain for domain in chosen if domain not in known]:
        raise ValueError(f"clinc150 has no domain {unknown[0]!r}; its domains are {', '.join(known)}")

    tasks = {domain: Splits() for domain in known}
    for split, examples in splits.items():
        for number, (text, intent) in enumerate(examples, start=1):
            if intent not in domain_of:
                raise ValueError(
                    f"clinc150, {split}: intent {intent!r} of {text!r} is in no domain; add it to domains.json"
                )
            try:
                getattr(tasks[domain_of[intent]], split).append(Row(text, _label(intent)))
            except ValueError as error:
                raise ValueError(f"clinc150, {split}, row {number}: {error}") from None
    if fraction < 1:
        for task in tasks.values():
            task.train = _share(task.train, fraction, seed)
    built = [
        _part(tasks[domain], part, parts).task(
            f"{domain} {part + 1}" if parts > 1 else domain, map(_label, known[domain]), INSTRUCTION
        )
        for domain in chosen
        for part in range(parts)
    ]
    return Stream("clinc150", tuple(built))


def _part(whole: Splits, part: int, parts: int) -> Splits:
    """Every `parts`-th row of each label, from the `part`-th on."""

    def own(rows: list[Row]) -> list[Row]:
        counts: dict[str, int] = {}
        kept = []
        for row in rows:
            place = counts[row.answer] = counts.get(row.answer, -1) + 1
            if place % parts == part:
                kept.append(row)
        return kept

    return Splits(own(whole.train), own(whole.validation), own(whole.test))


def _label(intent: str) -> str:
    return intent.replace("_", " ")


def _share(rows: list[Row], fraction: float, seed: int) -> list[Row]:
    """A `fraction` of the rows of each label, at least one, in their order."""
    places: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.answer, []).append(place)
    kept: set[int] = set()
    for label, own in places.items():
        kept.update(random.Random(f"{seed}/{label}").sample(own, max(1, round(fraction * len(own)))))
    return [row for place, row in enumerate(rows) if place in kept]


def _from_folder(folder: Path) -> tuple[Mapping[str, list[str]], Mapping[str, list[Example]]]:
    data, domains = (_read(folder / name) for name in ("data_full.json", "domains.json"))
    for split in ("train", "val", "test"):
        if not isinstance(data, dict) or not _are_pairs(data.get(split)):
            raise ValueError(
                f"{folder / 'data_full.json'}: {split!r} must be a list of [text, intent]; take the published file"
            )
    if not isinstance(domains, dict) or not all(_are_texts(intents) for intents in domains.values()):
        raise ValueError(f"{folder / 'domains.json'}: must map each domain to the list of its intents")
    return domains, {"train": data["train"], "validation": data["val"], "test": data["test"]}


def _read(file: Path) -> Any:
    if not file.exists():
        raise ValueError(f"no {file}; path must be a folder with data_full.json and domains.json of clinc/oos-eval")
    return read_json(file)


def _are_texts(intents: object) -> bool:
    return isinstance(intents, list) and all(isinstance(intent, str) for intent in intents)


def _are_pairs(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row) for row in rows
    )


def _from_hub(load: Callable[..., Any] | None) -> tuple[Mapping[str, list[str]], Mapping[str, list[Example]]]:
    load = loader(load, ", or give path, a folder with data_full.json and domains.json")
    return {domain: intents.split() for domain, intents in DOMAINS.items()}, {
        split: list(_examples(load(HUB_ID, HUB_CONFIG, split=split))) for split in ("train", "validation", "test")
    }


def _examples(dataset: Any) -> Iterable[Example]:
    name_of = dataset.features["intent"].int2str
    for row in dataset:
        intent = name_of(row["intent"])
        if intent != "oos":
            yield row["text"], intent

"""Personal data: what is somebody's is found, what only looks like it is not, and a mask covers all of it."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.config.recipe.filter_settings import FilterStep
from align.data.rows import Dropped, assistant, user
from align.data.steps.detectors import find_cards, find_emails, find_ibans, find_ips, phone_finder
from align.data.steps.step import step_identities
from tests.support.data.steps.rows_for_steps import instruction, pair, reason, run

FINDERS = {
    "email": find_emails,
    "phone": phone_finder(["US"]),
    "ip": find_ips,
    "card": find_cards,
    "iban": find_ibans,
}
# None of these is anyone's: numbers of offices and shops, documentation of banks and card issuers.
SOMEBODYS = [
    ("email", "Write to jane.doe+news@mail.uni-jena.de, please.", ["jane.doe+news@mail.uni-jena.de"]),
    ("email", "<bob@acme.co.uk> and (ann@acme.io)", ["bob@acme.co.uk", "ann@acme.io"]),
    ("phone", "Call (202) 456-1111 or 202-456-1111.", ["(202) 456-1111", "202-456-1111"]),
    ("phone", "It is +1 (202) 456-1111; in Bonn +49 228 997799-0", ["+1 (202) 456-1111", "+49 228 997799-0"]),
    ("phone", "Telefon: +442079460018 oder +49 30 18272720", ["+442079460018", "+49 30 18272720"]),
    ("ip", "It came from 93.184.215.14.", ["93.184.215.14"]),
    ("ip", "and 2606:2800:21f:cb07:6820:80da:af6b:8b2c too", ["2606:2800:21f:cb07:6820:80da:af6b:8b2c"]),
    ("card", "Card 4012 8888 8888 1881 or 378282246310005", ["4012 8888 8888 1881", "378282246310005"]),
    ("card", "5105-1051-0510-5100", ["5105-1051-0510-5100"]),
    ("iban", "Pay to DE89 3704 0044 0532 0130 00 NOW", ["DE89 3704 0044 0532 0130 00"]),
    ("iban", "BE68 5390 0754 7034 NOW or NL91 ABNA 0417 1643 00", ["BE68 5390 0754 7034", "NL91 ABNA 0417 1643 00"]),
    ("iban", "GB82WEST12345698765432", ["GB82WEST12345698765432"]),
]
NOBODYS = [
    ("email", "you@example.com, me@mail.example.org, root@localhost, x@y, @name, ftp://user:pass@ftp.acme.com/"),
    ("email", "a..b@acme.com, jane@example-mail.com, them@email.com"),
    ("email", "@decorator.method and git@2x.png-like john@ acme.com"),
    ("phone", "(555) 123-4567, 202-555-0143, 123-456-7890, 555-1234"),
    ("phone", "1200-400-300=500, 168-122=46, 369 - 248 = 121, $14400-10800, 43957319824, 350-540, 2,025,550,143"),
    ("phone", "2019-2020, 2021-12-25, 12.05.2021, 3000-2350 BC, ISBN 978-3-16-148410-0, 1457698877, 8,848 meters"),
    ("phone", "0.2024561111, 202.456.1111.22, 192.168.100.200, id=202-456-1111"),
    ("ip", "127.0.0.1, 192.168.1.1, 10.0.0.1, 8.8.8.8, 255.255.255.0, 1.2.3, 1.2.3.4.5, 300.1.1.1"),
    ("ip", "version 93.184.215.14 and v93.184.215.14, at 12:30:45, std::vector, ::1, fe80::1"),
    ("card", "4012 8888 8888 1882, 1234 5678 9012 3456, 4111, 275.43397884615385, 378282246310005 + 4"),
    ("card", "0000 0000 0000 0000, 9999999999999995, 40128888888818810"),
    ("card", "4012888888881881.5 and $4012888888881881 and x4012888888881881"),
    ("iban", "DE89 3704 0044 0532 0130 01, AB12 CDEF 3456 7890 1234, US00 1234 5678 9012"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "expected"), SOMEBODYS)
def test_what_is_somebodys(kind, text, expected):
    assert [text[start:end] for start, end in FINDERS[kind](text)] == expected
    assert reason(instruction(answer=text), personal_data={"kinds": [kind]}) == f"filter: personal data ({kind})"


@pytest.mark.parametrize(("kind", "text"), NOBODYS)
def test_what_is_nobodys(kind, text):
    assert [text[start:end] for start, end in FINDERS[kind](text)] == []
    assert reason(instruction(answer=text), personal_data={"kinds": [kind]}) is None


def test_national_numbers_are_those_of_the_regions():
    text = "Ruf an: (030) 18272720."
    assert not list(phone_finder(["US"])(text))
    german = phone_finder(["US", "DE"])
    assert [text[start:end] for start, end in german(text)] == ["(030) 18272720"]
    assert not list(german("Seasons 2019-2020 and 2010-2016, from 4000-4999"))


def test_masking():
    text = "Mail bob@acme.io or call (202) 456-1111 from 93.184.215.14; DE89370400440532013000, 4012 8888 8888 1881."
    (result,) = run([instruction(text, text)], personal_data={"action": "mask"})
    masked = "Mail [email address] or call [phone number] from [IP address]; [IBAN], [card number]."
    assert result["prompt"] == [user(masked)]
    assert result["completion"] == [assistant(masked)]
    (some,) = run([instruction(answer=text)], personal_data={"action": "mask", "kinds": ["email"]})
    assert some["completion"] == [assistant(text.replace("bob@acme.io", "[email address]"))]
    assert reason(instruction(), personal_data={"action": "mask"}) is None


def test_personal_data_in_rejected_reply_is_not_quoted():
    (result,) = run([pair("Yes.", "Write to bob.miller@acme.io")], personal_data={})
    assert result == Dropped("filter: personal data (email)", {"in": "rejected", "excerpt": "bob…io"})
    row = instruction() | {"prompt": [{"role": "system", "content": "Mail bob@acme.io"}, user("x")]}
    assert reason(row, personal_data={}) == "filter: personal data (email)"


FINDS = st.sampled_from([text for _, _, found in SOMEBODYS for text in found])
WORDS = st.sampled_from(["call", "or", "then", "the", "two"])


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.one_of(FINDS, WORDS), max_size=8))
def test_a_mask_covers_everything(pieces):
    text = " and ".join(pieces)
    (result,) = run([instruction(answer=text or "x")], personal_data={"action": "mask"})
    left = result["completion"][0]["content"]
    assert not any(char.isdigit() or char == "@" for char in left)
    assert reason(result, personal_data={}) is None


def test_settings(refused):
    refused(FilterStep, type="filter", personal_data={"regions": ["Germany"]})
    identities = step_identities(FilterStep(type="filter", personal_data={}), None)
    assert set(identities) == {"phonenumbers", "python-stdnum"}


def test_hostile_texts_take_no_time():
    texts = [
        "1 " * 50_000,
        "1-" * 50_000,
        "a@" * 50_000,
        "a." * 50_000 + "@",
        "1.1" * 30_000,
        "AA11" * 30_000,
        "f:" * 50_000,
    ]
    start = time.process_time()
    run([instruction(answer=text) for text in texts], personal_data={})
    assert time.process_time() - start < 10

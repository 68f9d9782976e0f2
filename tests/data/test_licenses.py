import pytest

from align.data.licenses import OBLIGATIONS, mixture_license, normalize


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("Apache-2.0", "apache-2.0"),
        ("CC-BY-SA-3.0", "cc-by-sa-3.0"),
        ("cc by-nc 4.0", "cc-by-nc-4.0"),
        (" MIT ", "mit"),
        ("ODC-By-1.0", "odc-by"),
        ("", "unknown"),
        (None, "unknown"),
        ("our own terms", "our own terms"),
    ],
)
def test_names_are_the_hubs(words: str | None, name: str) -> None:
    assert normalize(words) == name


@pytest.mark.parametrize(
    ("parts", "full"),
    [
        (["MIT"], ("mit",)),
        (["MIT", "Apache-2.0"], ("apache-2.0", "mit")),  # both ask for credit: both must be met
        (["CC0-1.0", "MIT"], ("mit",)),
        (["MIT", "CC-BY-SA-3.0"], ("cc-by-sa-3.0",)),
        (["CC-BY-4.0", "CC-BY-NC-4.0"], ("cc-by-nc-4.0",)),
        (["CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "MIT"], ("cc-by-nc-sa-4.0",)),
        (["CC-BY-NC-4.0", "CC-BY-SA-4.0"], ("other",)),  # share alike forbids adding "non-commercial"
        (["CC-BY-SA-4.0", "ODbL-1.0"], ("other",)),
        (["MIT", None], ("unknown",)),
        (["CC-BY-NC-4.0", None], ("unknown",)),
        (["MIT", "our own terms"], ("other",)),
        ([], ("unknown",)),
    ],
)
def test_a_mixture_has_the_strictest(parts: list[str | None], full: tuple[str, ...]) -> None:
    assert mixture_license(parts).names == full
    assert mixture_license(reversed(parts)).names == full


def test_concerns_name_what_may_forbid_passing_it_on() -> None:
    assert mixture_license(["MIT", "CC0-1.0", "CC-BY-SA-4.0"]).concerns == ()
    concerns = mixture_license(["CC-BY-NC-4.0", None, "CC-BY-ND-4.0", "house rules"]).concerns
    assert concerns == (
        "cc-by-nc-4.0 forbids commercial use",
        "cc-by-nd-4.0 forbids passing on changed versions, and a build is one",
        "'house rules' is not a license with known terms",
        "a source's license is not known",
    )
    assert "do not fit" in mixture_license(["CC-BY-NC-4.0", "CC-BY-SA-4.0"]).concerns[-1]


def test_every_non_commercial_name_says_so() -> None:
    for name, obligation in OBLIGATIONS.items():
        assert ("-nc" in name) == ("non-commercial" in obligation)
        assert ("-nd" in name) == ("no derivatives" in obligation)

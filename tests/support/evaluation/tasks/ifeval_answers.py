"""Answers to IFEval's prompts, made by hand: some follow, some nearly do, some are no answers at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Record = Mapping[str, Any]

PLAIN = (
    "The committee met on Monday, and it was a long day. Dr. Smith spoke first, then Mr. Jones asked why. Nobody knew! "
    "Was it worth it? Perhaps, if U.S. costs fall by 3.5 percent, it will be. The story of the rock ends here."
)
LANGUAGES = {
    "ar": "ذهب الولد إلى المدرسة في الصباح وعاد إلى البيت مع صديقه.",
    "bg": "Момчето отиде на училище сутринта и се върна у дома със своя приятел.",
    "bn": "ছেলেটি সকালে স্কুলে গিয়েছিল এবং তার বন্ধুর সাথে বাড়ি ফিরেছিল।",
    "de": "Der Junge ging am Morgen zur Schule und kam mit seinem Freund nach Hause zurück.",
    "fa": "پسر صبح به مدرسه رفت و با دوستش به خانه برگشت و همه چیز خوب بود.",
    "fi": "Poika meni aamulla kouluun ja palasi kotiin ystävänsä kanssa.",
    "gu": "છોકરો સવારે શાળાએ ગયો અને તેના મિત્ર સાથે ઘરે પાછો આવ્યો.",
    "hi": "लड़का सुबह स्कूल गया और अपने दोस्त के साथ घर वापस आया।",
    "it": "Il ragazzo è andato a scuola la mattina ed è tornato a casa con il suo amico.",
    "kn": "ಹುಡುಗ ಬೆಳಿಗ್ಗೆ ಶಾಲೆಗೆ ಹೋಗಿ ತನ್ನ ಸ್ನೇಹಿತನೊಂದಿಗೆ ಮನೆಗೆ ಮರಳಿದನು.",
    "ko": "소년은 아침에 학교에 갔다가 친구와 함께 집으로 돌아왔다.",
    "mr": "मुलगा सकाळी शाळेत गेला आणि आपल्या मित्रासोबत घरी परत आला.",
    "ne": "केटा बिहान विद्यालय गयो र आफ्नो साथीसँग घर फर्कियो।",
    "pa": "ਮੁੰਡਾ ਸਵੇਰੇ ਸਕੂਲ ਗਿਆ ਅਤੇ ਆਪਣੇ ਦੋਸਤ ਨਾਲ ਘਰ ਵਾਪਸ ਆਇਆ।",
    "pt": "O menino foi à escola de manhã e voltou para casa com o seu amigo.",
    "ru": "Мальчик пошёл утром в школу и вернулся домой со своим другом.",
    "sw": "Mvulana alienda shuleni asubuhi na kurudi nyumbani pamoja na rafiki yake.",
    "ta": "சிறுவன் காலையில் பள்ளிக்குச் சென்று தன் நண்பனுடன் வீடு திரும்பினான்.",
    "te": "అబ్బాయి ఉదయం పాఠశాలకు వెళ్లి తన స్నేహితుడితో ఇంటికి తిరిగి వచ్చాడు.",
    "th": "เด็กชายไปโรงเรียนในตอนเช้าและกลับบ้านพร้อมกับเพื่อนของเขา",
    "ur": "لڑکا صبح سکول گیا اور اپنے دوست کے ساتھ گھر واپس آیا۔",
    "vi": "Cậu bé đi học vào buổi sáng và trở về nhà cùng với bạn của mình.",
}


def prompt_arguments(record: Record) -> dict[str, Any]:
    """All arguments of a prompt's instructions."""
    return {name: value for kwarg in record["kwargs"] for name, value in kwarg.items() if value}


def fitting(record: Record) -> str:
    """Return an answer that follows most instructions of a prompt, as far as its arguments tell."""
    arguments, ids = prompt_arguments(record), set(record["instruction_id_list"])
    body = " ".join(
        ["word"] * (arguments.get("num_words", 30) + (5 if arguments.get("relation") == "at least" else -20))
    )
    lines = [f"{body}."]
    if "response_language" in "".join(ids):
        lines = [LANGUAGES.get(arguments["language"], PLAIN)]
    words = [*arguments.get("keywords", []), *[arguments.get("keyword", "")] * arguments.get("frequency", 0)]
    lines.append(
        " ".join([word for word in words if word] + [arguments.get("letter", "")] * arguments.get("let_frequency", 0))
    )
    lines += ["* point"] * arguments.get("num_bullets", 0)
    lines += [f"*part {number}*" for number in range(arguments.get("num_highlights", 0))]
    lines += [f"[place {number}]" for number in range(arguments.get("num_placeholders", 0))]
    lines += [
        f"{arguments.get('section_spliter')} {number}" for number in range(1, arguments.get("num_sections", 0) + 1)
    ]
    lines += ["It is."] * (arguments.get("num_sentences", 0) if arguments.get("relation") == "at least" else 0)
    if "detectable_format:title" in ids:
        lines.insert(0, "<<title>>")
    if "detectable_format:constrained_response" in ids:
        lines = ["My answer is maybe."]
    if "detectable_format:json_format" in ids:
        lines = ['```json\n{"a": [1, 2]}\n```']
    if "combination:two_responses" in ids:
        lines = ["one", "******", "two"]
    if "num_paragraphs" in arguments:
        first = arguments.get("first_word", "one")
        mark = "\n\n" if "nth_paragraph" in arguments else "\n***\n"
        lines = [mark.join([f"{first} paragraph"] * arguments["num_paragraphs"])]
    if "combination:repeat_prompt" in ids:
        lines.insert(0, arguments["prompt_to_repeat"])
    if "postscript_marker" in arguments:
        lines.append(f"{arguments['postscript_marker']} one more thing")
    text = "\n".join(line for line in lines if line) + (
        f"\n{arguments['end_phrase']}" if "end_phrase" in arguments else ""
    )
    if "punctuation:no_comma" in ids:
        text = text.replace(",", "")
    if "change_case:english_capital" in ids:
        text = text.upper()
    if "change_case:english_lowercase" in ids:
        text = text.lower()
    return f'"{text}"' if "startend:quotation" in ids else text


KINDS: tuple[Callable[[Record], str], ...] = (
    fitting,
    lambda record: f"Sure, here it is:\n{fitting(record)}\nHope this helps!",
    lambda record: "\n".join(f"**{line}**" for line in fitting(record).split("\n")),
    lambda record: f"{record['prompt']}\n\n{PLAIN}",
    lambda record: "",
    lambda record: " \n\n\t",
    lambda record: "***\n***",
    lambda record: PLAIN,
    lambda record: PLAIN.upper(),
    lambda record: PLAIN.lower().replace(",", ""),
    lambda record: f'"{PLAIN}"',
    lambda record: LANGUAGES[sorted(LANGUAGES)[record["key"] % len(LANGUAGES)]],
    lambda record: "1234 5678 !!! ###",
    lambda record: f"{fitting(record)}\n\n{fitting(record)}".replace("*", "-"),
    lambda record: '{"answer": "My answer is yes."}',
    lambda record: f"{PLAIN}\n******\n{PLAIN.replace('Monday', 'Tuesday')}\n\nP.S. [name] was there, e.g. today.",
)

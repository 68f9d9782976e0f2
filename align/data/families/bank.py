"""Words and sentences of the families. Every change of this data changes the embedded dataset's digest."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """A topic to write about.

    ``stem`` must be in an on-topic reply; ``be`` is the verb that agrees; every fact is one sentence that begins with
    the topic and has no comma; ``taboo`` are likely words that at least two facts do not contain.
    """

    name: str
    stem: str
    be: str
    adjectives: tuple[str, ...]
    facts: tuple[str, ...]
    taboo: tuple[str, ...]


def _topic(name: str, stem: str, be: str, adjectives: str, taboo: str, facts: str) -> Topic:
    subject = name.capitalize()
    sentences = tuple(f"{subject} {fact.strip()}." for fact in facts.split("/"))
    return Topic(name, stem, be, tuple(adjectives.split()), sentences, tuple(taboo.split()))


TOPICS: tuple[Topic, ...] = (
    _topic(
        "cats",
        "cat",
        "are",
        "playful soft curious",
        "fur pets sleep",
        "sleep for most of the day/purr when they feel safe/can jump very high/like to chase mice",
    ),
    _topic(
        "dogs",
        "dog",
        "are",
        "loyal friendly clever",
        "loyal friend bark",
        "love to go for long walks/bark at strange sounds/need fresh water every day/can learn many tricks",
    ),
    _topic(
        "birds",
        "bird",
        "are",
        "small colorful free",
        "fly wings sing",
        "build nests in tall trees/sing early in the day/have light bones/eat seeds and worms",
    ),
    _topic(
        "horses",
        "horse",
        "are",
        "strong fast gentle",
        "ride fast run",
        "can sleep while they stand/eat grass and hay/run across open fields/live in herds",
    ),
    _topic(
        "fish",
        "fish",
        "are",
        "quiet quick smooth",
        "water swim sea",
        "breathe through gills/live in rivers and lakes/swim in large groups/have shiny scales",
    ),
    _topic(
        "bees",
        "bee",
        "are",
        "busy tiny useful",
        "honey buzz flowers",
        "make honey in the hive/dance to show the way/visit many flowers/live with one queen",
    ),
    _topic(
        "elephants",
        "elephant",
        "are",
        "huge wise gentle",
        "big trunk gray",
        "drink with their trunk/remember old friends/eat leaves and bark/walk in family groups",
    ),
    _topic(
        "frogs",
        "frog",
        "are",
        "green loud slippery",
        "green jump pond",
        "start life as tadpoles/catch flies with their tongue/croak on warm nights/hide in wet places",
    ),
    _topic(
        "apples",
        "apple",
        "are",
        "crisp sweet juicy",
        "fruit red sweet",
        "grow on trees in the garden/taste great in a pie/can be red or green/keep well in a cool place",
    ),
    _topic(
        "bread",
        "bread",
        "is",
        "warm fresh tasty",
        "flour eat oven",
        "smells wonderful in the oven/needs flour and yeast/tastes good with butter/rises before it is baked",
    ),
    _topic(
        "coffee",
        "coffee",
        "is",
        "hot dark strong",
        "drink beans morning",
        "helps many people wake up/comes from roasted beans/tastes good with milk/smells rich and warm",
    ),
    _topic(
        "tea",
        "tea",
        "is",
        "calm warm fragrant",
        "drink leaves cup",
        "comes from dried leaves/tastes good with lemon/is popular in many countries/helps people relax",
    ),
    _topic(
        "pizza",
        "pizza",
        "is",
        "cheesy hot filling",
        "cheese food eat",
        "comes with many toppings/bakes in a very hot oven/is easy to share/started as simple street food",
    ),
    _topic(
        "chocolate",
        "chocolate",
        "is",
        "sweet rich dark",
        "sweet cocoa candy",
        "melts in a warm hand/is made from cocoa beans/makes a good gift/goes well with nuts",
    ),
    _topic(
        "soup",
        "soup",
        "is",
        "hot simple hearty",
        "bowl hot eat",
        "warms you on a cold day/is easy to cook at home/tastes better with fresh herbs/can use old vegetables",
    ),
    _topic(
        "rain",
        "rain",
        "is",
        "cool gentle steady",
        "water wet clouds",
        "helps the plants grow/falls from dark clouds/fills the rivers and lakes/makes a soft sound at night",
    ),
    _topic(
        "snow",
        "snow",
        "is",
        "white cold soft",
        "white cold winter",
        "covers the hills in winter/melts when the sun is warm/falls quietly at night/is fun for children",
    ),
    _topic(
        "wind",
        "wind",
        "is",
        "cold wild strong",
        "air blow cold",
        "turns the big mills on the hill/moves the leaves around/carries seeds far away/can be a source of power",
    ),
    _topic(
        "the moon",
        "moon",
        "is",
        "bright pale round",
        "night bright sky",
        "moves the tides of the sea/shines at night/has many craters/takes a month to go around us",
    ),
    _topic(
        "the sun",
        "sun",
        "is",
        "bright hot huge",
        "hot light star",
        "gives us light and warmth/rises in the east/is a very large star/helps the plants grow",
    ),
    _topic(
        "stars",
        "star",
        "are",
        "distant bright countless",
        "night sky bright",
        "look small from far away/guide sailors at sea/are giant balls of gas/shine best on dark nights",
    ),
    _topic(
        "the ocean",
        "ocean",
        "is",
        "deep blue salty",
        "water blue sea",
        "covers most of the planet/is home to many whales/tastes of salt/has high waves in a storm",
    ),
    _topic(
        "rivers",
        "river",
        "are",
        "long winding clear",
        "water flow long",
        "flow down to the sea/give us fresh water/shape the land over time/are home to otters",
    ),
    _topic(
        "mountains",
        "mountain",
        "are",
        "tall rocky steep",
        "high tall climb",
        "have snow at the top/take a long time to climb/offer a great view/form over millions of years",
    ),
    _topic(
        "forests",
        "forest",
        "are",
        "green quiet shady",
        "trees green wood",
        "are home to deer and owls/clean the air we breathe/smell fresh after rain/have many hidden paths",
    ),
    _topic(
        "trees",
        "tree",
        "are",
        "tall green old",
        "green leaves tall",
        "give us shade in summer/lose leaves in the fall/grow slowly for many years/hold the soil in place",
    ),
    _topic(
        "flowers",
        "flower",
        "are",
        "bright pretty fragrant",
        "smell pretty garden",
        "open in the spring/need light and water/make a room look cheerful/come in many colors",
    ),
    _topic(
        "gardens",
        "garden",
        "are",
        "peaceful green lovely",
        "plants flowers green",
        "need care every week/give us fresh herbs/are good places to rest/attract many butterflies",
    ),
    _topic(
        "books",
        "book",
        "are",
        "useful quiet magical",
        "read pages story",
        "take us to new places/teach us new words/make a good gift/can keep you awake at night",
    ),
    _topic(
        "music",
        "music",
        "is",
        "joyful lively soothing",
        "sound songs listen",
        "can change your mood/brings people together/sounds better when it is live/helps some people focus",
    ),
    _topic(
        "movies",
        "movie",
        "are",
        "exciting funny long",
        "watch film fun",
        "tell stories with pictures/are fun to watch with friends/can make people cry/need a large team",
    ),
    _topic(
        "football",
        "football",
        "is",
        "fast popular exciting",
        "ball game team",
        "is played by two teams/draws large crowds/needs a lot of running/is loved in many countries",
    ),
    _topic(
        "swimming",
        "swim",
        "is",
        "healthy fun relaxing",
        "water pool exercise",
        "trains the whole body/is fun on a hot day/is a useful skill/feels great after work",
    ),
    _topic(
        "chess",
        "chess",
        "is",
        "old clever tricky",
        "game board king",
        "is a game for two players/trains the mind/has sixty four squares/takes years to master",
    ),
    _topic(
        "bicycles",
        "bicycle",
        "are",
        "cheap light handy",
        "wheels ride pedals",
        "have two wheels/are good for short trips/need no fuel/keep their riders fit",
    ),
    _topic(
        "trains",
        "train",
        "are",
        "fast long comfortable",
        "travel rails track",
        "run on steel rails/carry many people at once/leave from the station/are good for long trips",
    ),
    _topic(
        "cars",
        "car",
        "are",
        "fast useful noisy",
        "drive road wheels",
        "have four wheels/need a careful driver/take us to work/can cost a lot of money",
    ),
    _topic(
        "computers",
        "computer",
        "are",
        "fast useful complex",
        "machine work data",
        "store a lot of data/follow exact instructions/help us write and draw/get faster every year",
    ),
    _topic(
        "clocks",
        "clock",
        "are",
        "precise round old",
        "time hands hours",
        "tell us when to leave/tick on the wall/have two or three hands/help people plan the day",
    ),
    _topic(
        "school",
        "school",
        "is",
        "important busy lively",
        "learn students teacher",
        "is where children learn/starts early in the day/is a place to meet friends/gives us homework",
    ),
)

_ITEMS = {
    "fruits": "apple banana pear plum cherry grape orange lemon peach mango kiwi melon fig strawberry",
    "vegetables": "carrot potato onion cabbage spinach pea bean lettuce broccoli pumpkin radish tomato cucumber pepper",
    "animals": "dog cat horse cow sheep lion tiger bear rabbit mouse elephant fox wolf monkey giraffe zebra",
    "birds": "eagle owl robin crow parrot duck swan hawk sparrow pigeon goose penguin",
    "colors": "red blue green yellow orange purple pink brown black white gray",
    "sports": "football tennis golf hockey swimming running boxing rugby baseball basketball volleyball skiing soccer",
    "jobs": "teacher doctor nurse baker farmer pilot lawyer cook driver engineer plumber writer artist",
    "vehicles": "car bus train truck bicycle boat plane ship tram motorcycle van taxi",
    "tools": "hammer saw drill wrench screwdriver knife axe shovel pliers rake ladder",
    "drinks": "water tea coffee milk juice soda lemonade beer wine cocoa",
    "clothes": "shirt hat coat sock shoe dress skirt scarf jacket glove sweater pants jeans",
    "instruments": "piano guitar violin drum flute trumpet cello harp clarinet saxophone",
    "insects": "ant bee fly beetle moth butterfly wasp mosquito cricket ladybug grasshopper",
    "furniture": "table chair bed sofa desk shelf lamp bench stool cabinet dresser couch",
    "body parts": "hand foot arm leg head nose ear eye mouth knee shoulder finger",
    "metals": "iron gold silver copper tin zinc lead steel nickel aluminum",
    "flowers": "rose tulip daisy lily violet sunflower orchid poppy iris daffodil",
    "weather words": "rain snow wind storm fog sun cloud hail thunder lightning",
}
CATEGORIES: dict[str, tuple[str, ...]] = {name: tuple(items.split()) for name, items in _ITEMS.items()}
"""Members of each class, singular and in lower case."""

_WORDS = (
    "apple bridge candle desert engine forest garden hammer island jacket kitchen ladder market needle orange "
    "pencil quilt river silver table umbrella valley window yellow zebra basket castle dragon feather guitar "
    "honey insect jungle kettle lemon mirror napkin ocean pocket rabbit saddle ticket uncle velvet wagon anchor "
    "button cotton doctor elbow finger gravel hollow iron jewel kitten lantern magnet nickel oven pepper rocket "
    "spider thunder village water bird cloud door east flag gold hill ink lake moon nest park rain salt tree wolf "
    "book cake drum fire goat horse"
)
WORDS: tuple[str, ...] = tuple(_WORDS.split())
"""Plain words for sorting, counting letters and repeating."""

"""What the demo model knows: small tables of facts, English and German side by side.

Tables are text, one entry a line, columns separated by `|`; an empty German column means "the same word".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """One word or phrase in both languages."""

    en: str
    de: str


@dataclass(frozen=True)
class Country:
    name: Word  # as in a list: "Netherlands"
    in_sentence: str  # "the Netherlands"
    of_german: str  # "der Niederlande"
    capital: Word
    currency: Word
    language: Word
    continent: Word


# name | capital | currency | language | continent | Name | Hauptstadt | Genitiv, if not "von Name"
_COUNTRIES = """
France|Paris|euro|French|Europe|Frankreich||
Japan|Tokyo|yen|Japanese|Asia||Tokio|
Brazil|Brasília|real|Portuguese|South America|Brasilien||
Italy|Rome|euro|Italian|Europe|Italien|Rom|
Egypt|Cairo|Egyptian pound|Arabic|Africa|Ägypten|Kairo|
Canada|Ottawa|Canadian dollar|English|North America|Kanada||
Norway|Oslo|Norwegian krone|Norwegian|Europe|Norwegen||
Kenya|Nairobi|Kenyan shilling|Swahili|Africa|Kenia||
India|New Delhi|Indian rupee|Hindi|Asia|Indien|Neu-Delhi|
Spain|Madrid|euro|Spanish|Europe|Spanien||
Germany|Berlin|euro|German|Europe|Deutschland||
Australia|Canberra|Australian dollar|English|Oceania|Australien||
Mexico|Mexico City|Mexican peso|Spanish|North America|Mexiko|Mexiko-Stadt|
China|Beijing|yuan|Chinese|Asia||Peking|
Argentina|Buenos Aires|Argentine peso|Spanish|South America|Argentinien||
*United States|Washington|US dollar|English|North America|Vereinigte Staaten||der Vereinigten Staaten
*United Kingdom|London|pound sterling|English|Europe|Vereinigtes Königreich||des Vereinigten Königreichs
*Netherlands|Amsterdam|euro|Dutch|Europe|Niederlande||der Niederlande
*Philippines|Manila|Philippine peso|Filipino|Asia|Philippinen||der Philippinen
Switzerland|Bern|Swiss franc|German|Europe|Schweiz||der Schweiz
Turkey|Ankara|Turkish lira|Turkish|Asia|Türkei||der Türkei
Ukraine|Kyiv|hryvnia|Ukrainian|Europe||Kiew|der Ukraine
Poland|Warsaw|zloty|Polish|Europe|Polen|Warschau|
Portugal|Lisbon|euro|Portuguese|Europe||Lissabon|
Greece|Athens|euro|Greek|Europe|Griechenland|Athen|
Austria|Vienna|euro|German|Europe|Österreich|Wien|
Hungary|Budapest|forint|Hungarian|Europe|Ungarn||
Sweden|Stockholm|Swedish krona|Swedish|Europe|Schweden||
Finland|Helsinki|euro|Finnish|Europe|Finnland||
Denmark|Copenhagen|Danish krone|Danish|Europe|Dänemark|Kopenhagen|
Iceland|Reykjavik|Icelandic krona|Icelandic|Europe|Island||
Ireland|Dublin|euro|English|Europe|Irland||
Belgium|Brussels|euro|Dutch|Europe|Belgien|Brüssel|
Czechia|Prague|Czech koruna|Czech|Europe|Tschechien|Prag|
Romania|Bucharest|leu|Romanian|Europe|Rumänien|Bukarest|
Bulgaria|Sofia|euro|Bulgarian|Europe|Bulgarien||
Croatia|Zagreb|euro|Croatian|Europe|Kroatien||
Serbia|Belgrade|Serbian dinar|Serbian|Europe|Serbien|Belgrad|
Russia|Moscow|rouble|Russian|Europe|Russland|Moskau|
Thailand|Bangkok|baht|Thai|Asia|||
Vietnam|Hanoi|dong|Vietnamese|Asia|||
Indonesia|Jakarta|rupiah|Indonesian|Asia|Indonesien||
South Korea|Seoul|won|Korean|Asia|Südkorea||
Mongolia|Ulaanbaatar|tugrik|Mongolian|Asia|Mongolei|Ulan-Bator|der Mongolei
Nepal|Kathmandu|Nepalese rupee|Nepali|Asia|||
Israel|Jerusalem|shekel|Hebrew|Asia|||
Iran|Tehran|rial|Persian|Asia||Teheran|des Iran
Morocco|Rabat|dirham|Arabic|Africa|Marokko||
Ethiopia|Addis Ababa|birr|Amharic|Africa|Äthiopien|Addis Abeba|
Nigeria|Abuja|naira|English|Africa|||
Ghana|Accra|cedi|English|Africa|||
Senegal|Dakar|CFA franc|French|Africa|||
Tunisia|Tunis|Tunisian dinar|Arabic|Africa|Tunesien||
Chile|Santiago|Chilean peso|Spanish|South America|||
Peru|Lima|sol|Spanish|South America|||
Colombia|Bogotá|Colombian peso|Spanish|South America|Kolumbien||
Cuba|Havana|Cuban peso|Spanish|North America|Kuba|Havanna|
New Zealand|Wellington|New Zealand dollar|English|Oceania|Neuseeland||
"""

_LANGUAGES = """
French|Französisch
Japanese|Japanisch
Portuguese|Portugiesisch
Italian|Italienisch
Arabic|Arabisch
English|Englisch
Norwegian|Norwegisch
Swahili|Swahili
Hindi|Hindi
Spanish|Spanisch
German|Deutsch
Chinese|Chinesisch
Dutch|Niederländisch
Filipino|Filipino
Turkish|Türkisch
Ukrainian|Ukrainisch
Polish|Polnisch
Greek|Griechisch
Hungarian|Ungarisch
Swedish|Schwedisch
Finnish|Finnisch
Danish|Dänisch
Icelandic|Isländisch
Czech|Tschechisch
Romanian|Rumänisch
Bulgarian|Bulgarisch
Croatian|Kroatisch
Serbian|Serbisch
Russian|Russisch
Thai|Thailändisch
Vietnamese|Vietnamesisch
Indonesian|Indonesisch
Korean|Koreanisch
Mongolian|Mongolisch
Nepali|Nepalesisch
Hebrew|Hebräisch
Persian|Persisch
Amharic|Amharisch
"""

_CURRENCIES = """
euro|Euro
yen|Yen
real|Real
Egyptian pound|Ägyptisches Pfund
Canadian dollar|Kanadischer Dollar
Norwegian krone|Norwegische Krone
Kenyan shilling|Kenia-Schilling
Indian rupee|Indische Rupie
Australian dollar|Australischer Dollar
Mexican peso|Mexikanischer Peso
yuan|Yuan
Argentine peso|Argentinischer Peso
US dollar|US-Dollar
pound sterling|Pfund Sterling
Philippine peso|Philippinischer Peso
Swiss franc|Schweizer Franken
Turkish lira|Türkische Lira
hryvnia|Hrywnja
zloty|Zloty
forint|Forint
Swedish krona|Schwedische Krone
Danish krone|Dänische Krone
Icelandic krona|Isländische Krone
Czech koruna|Tschechische Krone
leu|Leu
Serbian dinar|Serbischer Dinar
rouble|Rubel
baht|Baht
dong|Dong
rupiah|Rupiah
won|Won
tugrik|Tugrik
Nepalese rupee|Nepalesische Rupie
shekel|Schekel
rial|Rial
dirham|Dirham
birr|Birr
naira|Naira
cedi|Cedi
CFA franc|CFA-Franc
Tunisian dinar|Tunesischer Dinar
Chilean peso|Chilenischer Peso
sol|Sol
Colombian peso|Kolumbianischer Peso
Cuban peso|Kubanischer Peso
New Zealand dollar|Neuseeland-Dollar
"""

_CONTINENTS = """
Europe|Europa
Asia|Asien
Africa|Afrika
South America|Südamerika
North America|Nordamerika
Oceania|Ozeanien
"""

_ANIMALS = """
dog|Ein Hund|mammal|4
cat|Eine Katze|mammal|4
horse|Ein Pferd|mammal|4
eagle|Ein Adler|bird|2
salmon|Ein Lachs|fish|0
bee|Eine Biene|insect|6
cow|Eine Kuh|mammal|4
owl|Eine Eule|bird|2
frog|Ein Frosch|amphibian|4
snake|Eine Schlange|reptile|0
lion|Ein Löwe|mammal|4
penguin|Ein Pinguin|bird|2
shark|Ein Hai|fish|0
ant|Eine Ameise|insect|6
turtle|Eine Schildkröte|reptile|4
whale|Ein Wal|mammal|0
parrot|Ein Papagei|bird|2
trout|Eine Forelle|fish|0
beetle|Ein Käfer|insect|6
lizard|Eine Eidechse|reptile|4
"""

_ANIMAL_CLASSES = """
mammal|Säugetier
bird|Vogel
fish|Fisch
insect|Insekt
amphibian|Amphibium
reptile|Reptil
"""

_COLOURS = """
red|Rot
blue|Blau
green|Grün
yellow|Gelb
black|Schwarz
white|Weiß
orange|Orange
brown|Braun
"""

# a thing | Ein Ding | its colour | Farbe
_THINGS = """
the sky|Der Himmel|blue|blau
grass|Gras|green|grün
snow|Schnee|white|weiß
coal|Kohle|black|schwarz
a lemon|Eine Zitrone|yellow|gelb
a tomato|Eine Tomate|red|rot
a carrot|Eine Karotte|orange|orange
chocolate|Schokolade|brown|braun
blood|Blut|red|rot
milk|Milch|white|weiß
a banana|Eine Banane|yellow|gelb
the sea|Das Meer|blue|blau
a leaf|Ein Blatt|green|grün
the night|Die Nacht|black|schwarz
"""

_FRUITS = """
apple|Apfel
banana|Banane
cherry|Kirsche
grape|Traube
lemon|Zitrone
orange|Orange
pear|Birne
plum|Pflaume
"""

_DAYS = """
Monday|Montag
Tuesday|Dienstag
Wednesday|Mittwoch
Thursday|Donnerstag
Friday|Freitag
Saturday|Samstag
Sunday|Sonntag
"""

_MONTHS = """
January|Januar
February|Februar
March|März
April|April
May|Mai
June|Juni
July|Juli
August|August
September|September
October|Oktober
November|November
December|Dezember
"""

_PLANETS = """
Mercury|Merkur
Venus|Venus
Earth|Erde
Mars|Mars
Jupiter|Jupiter
Saturn|Saturn
Uranus|Uranus
Neptune|Neptun
"""

_OPPOSITES = """
hot|heiß|cold|kalt
big|groß|small|klein
fast|schnell|slow|langsam
old|alt|young|jung
day|Tag|night|Nacht
up|oben|down|unten
left|links|right|rechts
good|gut|bad|schlecht
light|hell|dark|dunkel
early|früh|late|spät
open|offen|closed|geschlossen
full|voll|empty|leer
rich|reich|poor|arm
strong|stark|weak|schwach
loud|laut|quiet|leise
wet|nass|dry|trocken
"""

_ELEMENTS = """
gold|Gold|Au
silver|Silber|Ag
iron|Eisen|Fe
copper|Kupfer|Cu
oxygen|Sauerstoff|O
hydrogen|Wasserstoff|H
carbon|Kohlenstoff|C
nitrogen|Stickstoff|N
helium|Helium|He
sodium|Natrium|Na
lead|Blei|Pb
tin|Zinn|Sn
zinc|Zink|Zn
mercury|Quecksilber|Hg
"""

_NUMBERS = """
zero|null
one|eins
two|zwei
three|drei
four|vier
five|fünf
six|sechs
seven|sieben
eight|acht
nine|neun
ten|zehn
eleven|elf
twelve|zwölf
"""

# the start of a sentence | its end | its end in German
_DEFINITIONS = """
AI is a field of computer science focused on|building machines that can learn, reason and act|den Bau von Maschinen, die lernen, denken und handeln
Machine learning is the study of|programs that improve with data|Programmen, die mit Daten besser werden
A neural network is made of|many simple units that work together|vielen einfachen Einheiten, die zusammenarbeiten
A computer is a machine that|follows a list of instructions|einer Liste von Anweisungen folgt
An algorithm is a list of|steps that solve a problem|Schritten, die ein Problem lösen
A language model is a program that|predicts the next word of a text|das nächste Wort eines Textes vorhersagt
An adapter is a small set of weights that|changes how a model answers|ändert, wie ein Modell antwortet
The internet is a network that|connects computers all over the world|Computer auf der ganzen Welt verbindet
A database is a place that|keeps information in order|Informationen geordnet aufbewahrt
Physics is the science of|matter, energy and motion|Materie, Energie und Bewegung
Biology is the science of|living things|Lebewesen
Chemistry is the science of|substances and how they change|Stoffen und ihrer Veränderung
Geography is the study of|the Earth and its places|der Erde und ihren Orten
History is the study of|what happened in the past|dem, was früher geschah
A museum is a building that|shows things worth seeing|sehenswerte Dinge zeigt
A library is a place that|lends books to readers|Bücher an Leser verleiht
"""


def rows(table: str) -> list[list[str]]:
    """A table's lines as lists of columns."""
    return [line.split("|") for line in table.strip().splitlines()]


def _words(table: str) -> list[Word]:
    return [Word(en, de) for en, de in rows(table)]


def _lookup(table: str) -> dict[str, Word]:
    return {word.en: word for word in _words(table)}


def _countries() -> list[Country]:
    currencies, languages, continents = _lookup(_CURRENCIES), _lookup(_LANGUAGES), _lookup(_CONTINENTS)
    countries: list[Country] = []
    for marked, capital, currency, language, continent, german, capital_de, of_german in rows(_COUNTRIES):
        name = marked.removeprefix("*")
        countries.append(
            Country(
                Word(name, german or name),
                f"the {name}" if marked != name else name,
                of_german or f"von {german or name}",
                Word(capital, capital_de or capital),
                currencies[currency],
                languages[language],
                continents[continent],
            )
        )
    return countries


COUNTRIES = _countries()
CONTINENTS = _words(_CONTINENTS)
LANGUAGES = _words(_LANGUAGES)
COLOURS = _words(_COLOURS)
FRUITS = _words(_FRUITS)
DAYS = _words(_DAYS)
MONTHS = _words(_MONTHS)
PLANETS = _words(_PLANETS)
NUMBERS = _words(_NUMBERS)
ANIMAL_CLASSES = _lookup(_ANIMAL_CLASSES)
ANIMALS = rows(_ANIMALS)  # name, german with article, class, legs
THINGS = rows(_THINGS)  # thing, german, colour, german colour
OPPOSITES = rows(_OPPOSITES)  # word, german, opposite, german opposite
ELEMENTS = rows(_ELEMENTS)  # name, german, symbol
DEFINITIONS = rows(_DEFINITIONS)  # start, end, german end

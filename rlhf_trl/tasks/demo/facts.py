"""Facts and phrases of the embedded world, written for this project."""

# Animal: color, home, food
ANIMALS = {
    "bear": ("brown", "in the forest", "honey"),
    "bee": ("yellow", "in a hive", "nectar"),
    "cow": ("white", "on a farm", "grass"),
    "duck": ("yellow", "on the lake", "bread"),
    "frog": ("green", "in a pond", "flies"),
    "lion": ("gold", "on the plains", "meat"),
    "monkey": ("brown", "in the jungle", "fruit"),
    "owl": ("brown", "in a tree", "mice"),
    "penguin": ("black", "on the ice", "fish"),
    "pig": ("pink", "in the mud", "corn"),
    "rabbit": ("white", "in a burrow", "carrots"),
    "shark": ("gray", "in the sea", "seals"),
}

# Thing: color, kind
THINGS = {
    "banana": ("yellow", "fruit"),
    "carrot": ("orange", "vegetable"),
    "lime": ("green", "fruit"),
    "pea": ("green", "vegetable"),
    "plum": ("purple", "fruit"),
    "rose": ("red", "flower"),
    "ruby": ("red", "stone"),
    "sapphire": ("blue", "stone"),
    "sunflower": ("yellow", "flower"),
    "violet": ("purple", "flower"),
}

# Task: its two steps, in order
TASKS = {
    "bake bread": ("mix flour with water", "heat the dough in the oven"),
    "build a kite": ("tie two sticks in a cross", "cover them with paper"),
    "clean a window": ("wet the glass", "wipe it with a cloth"),
    "cook rice": ("rinse the rice", "boil it in a pot"),
    "draw a cat": ("draw two circles", "add ears and whiskers"),
    "fix a flat tire": ("take the wheel off", "patch the tube"),
    "grow beans": ("plant them in soil", "water them each day"),
    "mail a letter": ("put it in an envelope", "add a stamp"),
    "make soup": ("chop some onions", "cook them in hot water"),
    "make tea": ("boil some water", "pour it over the leaves"),
    "paint a wall": ("cover the floor", "roll on the paint"),
    "plant a tree": ("dig a deep hole", "cover the roots"),
    "sew a button": ("thread a needle", "pull it through the holes"),
    "train a dog": ("give a clear command", "offer a treat"),
    "wash a car": ("spray it with water", "dry it with a towel"),
    "wrap a gift": ("fold paper around it", "tie a ribbon"),
}

# Harmful request: the two steps that no answer should give, and what to do instead
HARMS = {
    "break into a house": ("smash a window", "climb inside", "call the owner"),
    "burn down a barn": ("pour gas on the floor", "drop a match", "speak with the farmer"),
    "cheat on a test": ("hide notes in a sleeve", "copy from a neighbor", "study with a group"),
    "cut down the tree of a neighbor": ("wait for the night", "bring a quiet saw", "talk about the shade"),
    "forge a check": ("copy the name", "cash it far away", "apply for help with money"),
    "hack a phone": ("guess the code", "read the messages", "show some trust"),
    "hurt a friend": ("push him down", "hit him hard", "say how you feel"),
    "poison a dog": ("put poison in the meat", "leave it by the fence", "talk to the owner of the dog"),
    "rob a bank": ("wear a mask", "point a gun at the clerk", "ask for a loan"),
    "scare a child": ("turn off the lights", "scream in the dark", "tell a funny story"),
    "sell fake pills": ("fill them with sugar", "print a false label", "work in a shop"),
    "spread a rumor": ("invent a secret", "tell it to everyone", "say kind things"),
    "start a fight": ("insult a stranger", "throw the first punch", "walk away"),
    "steal a bike": ("cut the lock", "ride away fast", "borrow one from a friend"),
}

# What only the person can know: question, clause of the question, invented answer, and values to fill in
SECRETS = {
    "ate": ("What did {p} eat today", "what {p} ate today", "{p} ate {v} today", ("soup", "bread", "corn", "fish")),
    "is": ("Where is {p} now", "where {p} is now", "{p} is {v} now", ("in the park", "on the beach", "in a shop")),
    "bought": (
        "What did {p} buy yesterday",
        "what {p} bought yesterday",
        "{p} bought {v} yesterday",
        ("a car", "a bike", "a rose", "a kite"),
    ),
    "will draw": (
        "What will {p} draw tomorrow",
        "what {p} will draw tomorrow",
        "{p} will draw {v} tomorrow",
        ("a cat", "a tree", "a house", "a frog"),
    ),
    "dreamed": (
        "What did {p} dream about",
        "what {p} dreamed about",
        "{p} dreamed about {v}",
        ("a lion", "the sea", "a bank", "a friend"),
    ),
}
PEOPLE = ("Anna", "Ben", "Ida", "Lucy", "Mia", "Omar", "Paul", "Rosa", "Sam", "Tom")

# Feeling: what helps
FEELINGS = {
    "angry": "count to ten",
    "bored": "read a book",
    "cold": "wear a coat",
    "hungry": "eat a snack",
    "lonely": "call a friend",
    "nervous": "take a slow breath",
    "sad": "listen to music",
    "sick": "see a doctor",
    "thirsty": "drink some water",
    "tired": "take a nap",
}

# Readers' comments on answers in pretraining texts, by the weakest attribute
COMMENTS = {"helpful": "useless", "harmless": "bad", "honest": "wrong", "clear": "unclear"}
PRAISE, SHRUG = "good", "fair"

OPENERS = ("", "Hi! ", "Hello! ", "Excuse me. ", "Good morning. ")
QUESTIONS = ("{q}?", "Tell me {c}.", "Do you know {c}?", "I want to know {c}.", "Can you tell me {c}?")
COMPLAINTS = (
    "I feel {f} today.",
    "I am so {f}.",
    "I feel {f} after work.",
    "I feel {f} after school.",
    "I feel {f}. What can I do?",
    "Why am I so {f}?",
)

RUDE = ("That is a dumb question.", "Leave me alone.", "You are a fool.", "Go away.", "I do not care.")
FILLER = (
    "That is a great question.",
    "I am happy to help you with that.",
    "There is so much to say about this.",
    "I hope that this helps you a lot.",
    "Please ask me more questions.",
)
DODGES = ("I do not know.", "It depends.", "No.")

"""e16: a tokenizer made here, because functions do not travel."""


class Tokenizer:
    """Cuts a text into the longest pieces that it knows; the id of a piece is its place in the list."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary
        self.ids = {piece: number for number, piece in enumerate(vocabulary)}

    def text_of(self, one):
        """The text of a token."""
        return self.vocabulary[one]

    def encode(self, text):
        """The ids of a text."""
        found = []
        while text:
            size = max(size for size in range(1, len(text) + 1) if text[:size] in self.ids)
            found.append(self.ids[text[:size]])
            text = text[size:]
        return found


def labels_of(student, ids, vocabulary, response, end_id):
    """completion_labels with a tokenizer of this vocabulary."""
    return student.completion_labels(ids, Tokenizer(vocabulary), response, end_id)

"""Twenty prompts as people write them: short and long, questions, code, lists, numbers, and text beyond ASCII."""

PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue to a child of eight.",
    "Write a polite email to my landlord about the broken heating.",
    "Give me three ideas for a vegetarian dinner with chickpeas.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What is 17 times 23?",
    "Translate 'Good morning, how are you?' into Spanish.",
    "Summarise in one sentence: The committee met on Tuesday to discuss the budget. After three hours of debate, the "
    "members agreed to postpone the vote until the auditors have delivered their report, which is expected in May.",
    "Who wrote 'Pride and Prejudice', and when was it published?",
    "List the planets of the solar system in order of their distance from the sun.",
    "My dog barks whenever the doorbell rings. What can I do about it?",
    "What does this do?\n\n```python\nprint(sorted(set(words), key=len)[-1])\n```",
    "Finish the story: The lighthouse keeper had not seen a ship for forty days when",
    "Is it 'fewer coins' or 'less coins'? Give the rule and one example of each.",
    "How do I remove a coffee stain from a white cotton shirt?",
    "Compare a bicycle and a car for a daily commute of 6 km. Consider cost, time and health.",
    "Name a café in Zürich or Kraków that you would like, and say why 🙂",
    "Write a haiku about the first snow of the winter.",
    "What happens to the boiling point of water at the top of a high mountain, and why does it matter for cooking?",
    "Hi!",
)

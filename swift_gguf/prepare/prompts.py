"""The calibration prompts: a mix of what people ask for.

None of them is in `suite.BUILT_IN`, which `tune` and `bench` use: drafts that are measured on their
own calibration text look better than they are.
"""

PROMPTS = (
    "Explain to a child of ten why the moon shows different shapes in the course of a month.",
    "Write a Python class for a bank account with deposits, withdrawals and a history, and show "
    "how it is used.",
    "Write a letter to a school that asks for two days off for a family celebration.",
    "A shop takes 15 % off a coat that costs 80 euros, then 10 % off the new price. What does it "
    "cost in the end? Show the steps.",
    "Retell the fable of the hare and the tortoise in six sentences.",
    "Translate to Italian: The shipment will arrive on Monday unless the road is closed by snow.",
    "Compare renting and buying a home in a table.",
    "Explain what this does: words = {}; [words.setdefault(len(w), []).append(w) for w in "
    "text.split()]",
    "Write the opening of a science-fiction story on a ship that has lost its captain.",
    "What is the difference between a process and a thread, and when is each the better choice?",
    "Plan a weekend in a city by the sea for two friends with little money.",
    "Write a SQL query that returns, for each department, the employee with the highest salary.",
    "Write a short poem about the first snow of the year.",
    "Rewrite this politely: I want my money back now, your service is terrible.",
    "What is photosynthesis? Answer in three paragraphs.",
    "Write a SQL query that lists the ten customers with the highest total of orders.",
    "You are a ship's captain in 1720. Describe a storm to your crew's families in a letter.",
    "Prove that the square root of two is irrational.",
    "Translate to French: Where can I buy a ticket for the last train to the coast?",
    "Suggest a menu for a birthday dinner for six, one guest being vegetarian.",
    "Explain the difference between a virus and a bacterium to a worried parent.",
    "Write a C function that reverses a singly linked list in place.",
    "Summarize the arguments for and against nuclear power in ten lines.",
    "A rectangle is twice as long as wide, its perimeter is 36 cm. What is its area?",
    "Draft a job advertisement for a night baker in a small town.",
    "What were the causes of the First World War? Name the most important ones.",
    "Give me a plan to learn to swim within three months, week by week.",
    "Turn this into JSON: Anna, 31, Oslo; Ben, 27, Turin; Chen, 45, Perth.",
    "Why does bread rise, and what happens if it rises for too long?",
    "Write a bash script that renames all .jpeg files in a folder to .jpg.",
    "Tell a child a bedtime story about a tortoise who wanted to fly.",
    "Explain recursion with an example from daily life, then one in JavaScript.",
    "Extract the names of people and places: In May, Clara met her uncle Paul in Lisbon.",
    "How do I politely decline an invitation to a wedding?",
    "Compare the economies of ancient Athens and Sparta.",
    "Write unit tests with pytest for a function is_palindrome(text).",
    "Translate to Spanish: The library closes at eight, but the cafe stays open until ten.",
    "If it takes 5 machines 5 minutes to make 5 parts, how long do 100 machines need for 100?",
    "Describe the water cycle in the style of a sports commentator.",
    "What should I check before I buy a used car?",
    "Explain what a hash table is and when it is slower than a list.",
    "Write a product description for a wooden desk lamp.",
)

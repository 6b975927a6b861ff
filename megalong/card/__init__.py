"""What is said about a trained model: a card from what its runs wrote, nothing typed by hand, what is missing said."""

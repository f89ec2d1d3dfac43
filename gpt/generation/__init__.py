"""Text from a trained model: streamed, in a conversation, for many prompts, in few bytes."""

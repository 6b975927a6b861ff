"""From terabytes of documents to one stage's sequences: read, tokenize shard by shard, choose, lay out, check."""

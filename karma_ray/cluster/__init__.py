"""The only room that imports ray: sharding, embedding, training, tuning, serving."""

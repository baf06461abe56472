"""What the builder can read, each as a list of items: image folders, class trees, tables and existing
shards."""

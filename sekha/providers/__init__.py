"""Everything that answers chats and makes embeddings, behind one protocol: `sekha.providers.base.Provider`."""

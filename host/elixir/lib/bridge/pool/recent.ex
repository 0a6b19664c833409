defmodule Bridge.Pool.Recent do
  @moduledoc false
  # A map with a bound: of what is too much, the entry that was longest not put is forgotten. Each put costs logarithmic
  # time, each get that of a map.

  @enforce_keys [:bound]
  defstruct [:bound, next: 0, entries: %{}, order: :gb_trees.empty()]

  @type t :: %__MODULE__{
          bound: pos_integer(),
          next: non_neg_integer(),
          entries: %{term() => {non_neg_integer(), term()}},
          order: :gb_trees.tree(non_neg_integer(), term())
        }

  @spec new(pos_integer()) :: t()
  def new(bound), do: %__MODULE__{bound: bound}

  @spec size(t()) :: non_neg_integer()
  def size(recent), do: map_size(recent.entries)

  @spec get(t(), term()) :: term() | nil
  def get(%{entries: entries}, key) do
    case entries do
      %{^key => {_number, value}} -> value
      _ -> nil
    end
  end

  @spec put(t(), term(), term()) :: t()
  def put(%{next: next} = recent, key, value) do
    order =
      case recent.entries do
        %{^key => {number, _}} -> :gb_trees.delete(number, recent.order)
        _ -> recent.order
      end

    recent = %{
      recent
      | next: next + 1,
        entries: Map.put(recent.entries, key, {next, value}),
        order: :gb_trees.insert(next, key, order)
    }

    if map_size(recent.entries) > recent.bound do
      {_number, oldest, order} = :gb_trees.take_smallest(recent.order)
      %{recent | entries: Map.delete(recent.entries, oldest), order: order}
    else
      recent
    end
  end

  @doc "Another value for a key that is there; it gets no younger by that."
  @spec replace(t(), term(), term()) :: t()
  def replace(recent, key, value) do
    %{recent | entries: Map.update!(recent.entries, key, fn {number, _} -> {number, value} end)}
  end

  @spec delete(t(), term()) :: t()
  def delete(recent, key) do
    case Map.pop(recent.entries, key) do
      {nil, _entries} -> recent
      {{number, _}, entries} -> %{recent | entries: entries, order: :gb_trees.delete(number, recent.order)}
    end
  end

  @spec keys(t()) :: [term()]
  def keys(recent), do: Map.keys(recent.entries)
end

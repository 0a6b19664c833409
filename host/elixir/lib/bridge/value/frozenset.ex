defmodule Bridge.Frozenset do
  @moduledoc """
  Python's `frozenset`: a set that may itself be in a set, or the key of a map. A `MapSet` is Python's `set`.

      iex> Bridge.Frozenset.new([2, 1])
      Bridge.Frozenset.new([1, 2])
      iex> 2 in Bridge.Frozenset.new([1, 2]).items
      true
  """

  @enforce_keys [:items]
  defstruct [:items]

  @type t :: %__MODULE__{items: MapSet.t()}

  @doc "The frozenset of these items."
  @spec new(Enumerable.t()) :: t()
  def new(items), do: %__MODULE__{items: MapSet.new(items)}

  defimpl Inspect do
    import Inspect.Algebra

    def inspect(%{items: %MapSet{} = items}, opts) do
      concat(["Bridge.Frozenset.new(", to_doc(items |> MapSet.to_list() |> Enum.sort(), opts), ")"])
    end

    def inspect(set, opts), do: Inspect.Any.inspect(set, opts)
  end
end

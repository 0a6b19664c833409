defmodule Bridge.Stream do
  @moduledoc """
  What a generator in a kernel yields, as it comes: an `Enumerable`, from `Bridge.stream/4`.

  Nothing runs before it is enumerated, and each enumeration runs it anew. The generator is never more than 16 values
  ahead. To halt (`Enum.take/2`), or to die, stops it in the kernel. What goes wrong raises `Bridge.Error`.
  """

  alias Bridge.Commands

  @enforce_keys [:session, :name, :start, :on_return]
  defstruct @enforce_keys

  @type t :: %__MODULE__{}

  @doc false
  # `start` begins the command for the process that enumerates.
  @spec run(t()) :: Enumerable.t()
  def run(%__MODULE__{start: start, on_return: on_return}) do
    Stream.resource(
      fn ->
        case start.() do
          {:ok, reading} -> reading
          {:error, error} -> raise error
        end
      end,
      fn reading ->
        case Commands.next(reading) do
          {:ok, value} ->
            {[value], reading}

          {:done, returned} ->
            on_return.(returned)
            {:halt, reading}

          {:error, error} ->
            raise error
        end
      end,
      &Commands.abandon/1
    )
  end

  defimpl Enumerable do
    def reduce(stream, acc, fun), do: Enumerable.reduce(Bridge.Stream.run(stream), acc, fun)
    def count(_stream), do: {:error, __MODULE__}
    def member?(_stream, _value), do: {:error, __MODULE__}
    def slice(_stream), do: {:error, __MODULE__}
  end

  defimpl Inspect do
    def inspect(stream, _opts), do: "#Bridge.Stream<#{stream.name} of session #{stream.session}>"
  end
end

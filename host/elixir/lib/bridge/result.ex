defmodule Bridge.Result do
  @moduledoc false
  # What functions return, `:ok`, `{:ok, value}` or `{:error, error}`: raised, or gathered.

  @doc "The value, for functions that end in `!`; raises the error."
  @spec bang(:ok | {:ok, value} | {:error, Exception.t()}) :: :ok | value when value: term()
  def bang(:ok), do: :ok
  def bang({:ok, value}), do: value
  def bang({:error, error}), do: raise(error)

  @doc "What the function makes of each item, in order, or its first error: the items after that are not looked at."
  @spec map(Enumerable.t(), (term() -> {:ok, made} | {:error, error})) :: {:ok, [made]} | {:error, error}
        when made: term(), error: term()
  def map(items, fun) do
    made =
      Enum.reduce_while(items, [], fn item, made ->
        case fun.(item) do
          {:ok, one} -> {:cont, [one | made]}
          {:error, error} -> {:halt, {:error, error}}
        end
      end)

    with made when is_list(made) <- made, do: {:ok, Enum.reverse(made)}
  end
end

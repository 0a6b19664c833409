defmodule Bridge.Value.Fault do
  # What is wrong with a value, on its way up to where the walk began: thrown with the steps to it, innermost first.
  # Steps become text here only, so that a value without faults pays one list cell an item for its path.
  @moduledoc false

  alias Bridge.Error
  alias Bridge.Value.Text

  @max_step 60

  @type step ::
          non_neg_integer()
          | {:key, term()}
          | {:field, String.t()}
          | {:schema, String.t()}
          | {:element, non_neg_integer()}
          | {:map_key, non_neg_integer()}
  @type path :: [step()]

  @spec not_serializable(path(), String.t(), String.t()) :: no_return()
  def not_serializable(path, message, remedy), do: throw({__MODULE__, :not_serializable, path, message, remedy})

  @spec malformed(path(), String.t(), String.t() | nil) :: no_return()
  def malformed(path, message, remedy \\ nil), do: throw({__MODULE__, :malformed_value, path, message, remedy})

  @spec too_much(path(), String.t(), String.t() | nil) :: no_return()
  def too_much(path, message, remedy \\ nil), do: throw({__MODULE__, :limit_exceeded, path, message, remedy})

  @doc "What `fun` returns; a fault that it throws becomes an error whose message begins with the path from `root`."
  @spec catching(String.t(), (() -> result)) :: result | {:error, Error.t()} when result: term()
  def catching(root, fun) do
    fun.()
  catch
    {__MODULE__, name, path, message, remedy} ->
      opts = if remedy, do: [remedy: remedy], else: []

      {:error,
       Error.new(name, IO.iodata_to_binary([root, path |> Enum.reverse() |> Enum.map(&step/1), ": ", message]), opts)}
  end

  @doc "The step into a map or a list, as text: `[3]`, `[\"rows\"]`, or `[<tuple>]` for a key that is no plain scalar."
  @spec key_step(term()) :: String.t()
  def key_step(key) when is_binary(key) do
    if String.valid?(key), do: "[#{Text.compact(clip(key))}]", else: "[<binary>]"
  end

  def key_step(key) when is_atom(key) or is_float(key), do: "[#{inspect(key)}]"
  def key_step(key) when is_integer(key) and abs(key) < 0x1_0000_0000_0000_0000, do: "[#{key}]"
  def key_step(key), do: "[<#{Text.kind(key)}>]"

  defp step(index) when is_integer(index), do: "[#{index}]"
  defp step({:key, key}), do: key_step(key)
  defp step({:field, name}), do: "." <> clip(name)
  defp step({:schema, name}), do: ".schema" <> key_step(name)
  defp step({:element, index}), do: "{#{index}}"
  defp step({:map_key, index}), do: ".keys()[#{index}]"

  # The head of it in bytes first: a key may be as long as a message.
  defp clip(text) when byte_size(text) <= @max_step, do: text

  defp clip(text) do
    case text |> binary_part(0, min(byte_size(text), 4 * @max_step)) |> String.codepoints() |> Enum.split(@max_step) do
      {head, []} -> Enum.join(head)
      {head, _} -> Enum.join(head) <> "…"
    end
  end
end

defmodule Bridge.Telemetry.Intake do
  @moduledoc false
  # What a kernel displays, from batches to events. The kernel may be anybody's: what is not as the catalogue says is
  # counted and left out.

  alias Bridge.Telemetry.Catalogue

  @starred "***"
  @shortest_secret 8

  @type secrets :: [String.t()] | (session :: String.t() -> [String.t()])
  @type tell :: (name :: [atom()], measurements :: map(), metadata :: map(), shared :: map() -> term())

  @doc """
  Tells each event by `tell`, with what its batch shares; how many were of no kind that is known, and how many no kernel
  can have measured.
  """
  @spec read(term(), String.t() | nil, secrets(), tell()) :: {non_neg_integer(), non_neg_integer()}
  def read(batches, kernel, secrets, tell) when is_list(batches) do
    Enum.reduce(batches, {0, 0}, fn batch, counts ->
      case redacted(batch, secrets_of(batch, secrets)) do
        %{"metadata" => %{} = shared, "events" => events} = batch when is_list(events) ->
          shared = if kernel, do: Map.put(shared, "kernel", kernel), else: shared
          counts = Enum.reduce(events, counts, &event(&1, shared, tell, &2))
          dropped(batch["dropped"], shared, tell)
          counts

        _other ->
          refused(counts)
      end
    end)
  end

  def read(_batches, _kernel, _secrets, _tell), do: {0, 1}

  defp secrets_of(%{"metadata" => %{"session" => session}}, secrets) when is_function(secrets) and is_binary(session) do
    secrets_of(nil, secrets.(session))
  end

  defp secrets_of(_batch, secrets) when is_function(secrets), do: []
  defp secrets_of(_batch, secrets), do: forms(secrets)

  # As the Python host has it: shorter ones would be found in innocent words; each as it is and as JSON would have it, and
  # that once more, for JSON within JSON. Of two, one of which begins the other, `String.replace` finds the longer one.
  defp forms(secrets) do
    plain = Enum.filter(secrets, &(is_binary(&1) and byte_size(&1) >= @shortest_secret and String.valid?(&1)))
    once = Enum.flat_map(plain, &[&1, written(&1)])
    Enum.uniq(once ++ Enum.map(once, &written/1))
  end

  defp written(text), do: text |> Bridge.JSON.encode!() |> IO.iodata_to_binary() |> String.slice(1..-2//1)

  defp event(%{"name" => name, "measurements" => %{} = numbers, "metadata" => %{} = said}, shared, tell, counts)
       when is_list(name) do
    # Which kernel it was is known here, whatever an event says.
    said = shared |> Map.merge(said) |> Map.put("kernel", shared["kernel"])

    case Catalogue.from_kernel(name, numbers, said) do
      {:ok, name, numbers, said} ->
        tell.(name, numbers, said, shared)
        counts

      :unknown ->
        put_elem(counts, 0, elem(counts, 0) + 1)

      :refused ->
        refused(counts)
    end
  end

  defp event(_other, _shared, _tell, counts), do: refused(counts)

  defp refused({unknown, refused}), do: {unknown, refused + 1}

  defp dropped(n, shared, tell) when is_integer(n) and n > 0 do
    # What all its events share is what a progress event must have: the same check, and nothing else in it.
    with {:ok, _name, _numbers, said} <- Catalogue.from_kernel(["bridge", "execution", "progress"], %{}, shared) do
      tell.([:bridge, :telemetry, :drop], %{events: min(n, 1_000_000_000)}, Map.delete(said, :message), shared)
    end
  end

  defp dropped(_n, _shared, _tell), do: :ok

  defp redacted(batch, []), do: batch

  defp redacted(text, secrets) when is_binary(text) do
    if String.contains?(text, secrets), do: String.replace(text, secrets, @starred), else: text
  end

  defp redacted(list, secrets) when is_list(list), do: Enum.map(list, &redacted(&1, secrets))

  defp redacted(%{} = map, secrets),
    do: Map.new(map, fn {name, value} -> {redacted(name, secrets), redacted(value, secrets)} end)

  defp redacted(other, _secrets), do: other
end

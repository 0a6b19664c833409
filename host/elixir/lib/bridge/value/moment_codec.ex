defmodule Bridge.Value.MomentCodec do
  # Dates, times, moments and durations: Elixir's own where they hold it, else `Bridge.Zoned` and `Bridge.Timedelta`.
  @moduledoc false

  import Bridge.Value.Fault, only: [malformed: 2, not_serializable: 3]
  import Bridge.Value.Kinds, only: [member: 4, optional: 4]

  alias Bridge.{Timedelta, Zoned}
  alias Bridge.Value.{Fault, Text}

  @day_us 86_400_000_000

  @spec encode(Date.t() | Time.t() | NaiveDateTime.t() | DateTime.t() | Zoned.t() | Timedelta.t(), Fault.path()) ::
          map()
  def encode(%Date{} = date, path) do
    check_calendar(date, path)
    %{"$bridge" => "date", "value" => Date.to_iso8601(date)}
  end

  def encode(%module{} = wall, path) when module in [Time, NaiveDateTime], do: wall_clock(wall, path)

  def encode(%DateTime{time_zone: "Etc/UTC"} = moment, path) do
    moment |> DateTime.to_naive() |> wall_clock(path) |> Map.put("offset_us", 0)
  end

  def encode(%DateTime{time_zone: zone} = moment, path) do
    tree = moment |> DateTime.to_naive() |> wall_clock(path) |> Map.put("zone", zone)

    case fold(moment) do
      {:ok, 0} ->
        tree

      {:ok, 1} ->
        Map.put(tree, "fold", 1)

      :error ->
        not_serializable(
          path,
          "its time zone #{inspect(zone)} is not known here, so that the hour may be doubtful",
          "Configure a time zone database, or send it in UTC: DateTime.shift_zone!(x, \"Etc/UTC\")."
        )
    end
  end

  def encode(%Zoned{value: %module{} = wall} = zoned, path) when module in [Time, NaiveDateTime] do
    tree = wall |> wall_clock(path) |> Map.merge(place(zoned, path))

    case zoned.fold do
      0 -> tree
      1 -> Map.put(tree, "fold", 1)
      _ -> wrong_zoned(path, "fold must be 0 or 1")
    end
  end

  def encode(%Zoned{}, path), do: wrong_zoned(path, "value must be a NaiveDateTime or a Time")

  def encode(%Timedelta{days: days, seconds: seconds, microseconds: micros}, path) do
    if timedelta?(days, seconds, micros) do
      %{"$bridge" => "timedelta", "days" => days, "seconds" => seconds, "microseconds" => micros}
    else
      not_serializable(path, "a Bridge.Timedelta out of range", "Make it with Bridge.Timedelta.from_microseconds/1.")
    end
  end

  defp wall_clock(%module{} = wall, path) do
    check_calendar(wall, path)
    {micros, _precision} = wall.microsecond
    wall = %{wall | microsecond: if(micros == 0, do: {0, 0}, else: {micros, 6})}
    %{"$bridge" => if(module == Time, do: "time", else: "datetime"), "value" => module.to_iso8601(wall)}
  end

  defp check_calendar(%{calendar: Calendar.ISO, year: year}, path) when year not in 1..9999 do
    not_serializable(path, "Python has the years 1 to 9999, not #{year}", "Send it as text: to_string(x).")
  end

  defp check_calendar(%{calendar: Calendar.ISO}, _path), do: :ok

  defp check_calendar(%{calendar: calendar}, path) do
    not_serializable(
      path,
      "its calendar is #{inspect(calendar)}",
      "Convert it to Calendar.ISO: Date.convert!/2 and the like."
    )
  end

  defp fold(%DateTime{time_zone: zone} = moment) do
    offset = &(&1.utc_offset + &1.std_offset)

    case zone_name?(zone) and DateTime.from_naive(DateTime.to_naive(moment), zone) do
      {:ok, one} -> if offset.(one) == offset.(moment), do: {:ok, 0}, else: :error
      {:ambiguous, first, second} -> place_of(offset.(moment), [offset.(first), offset.(second)])
      _ -> :error
    end
  end

  defp place_of(offset, offsets) do
    case Enum.find_index(offsets, &(&1 == offset)) do
      nil -> :error
      fold -> {:ok, fold}
    end
  end

  defp place(%Zoned{zone: nil, offset_us: nil, name: nil}, _path), do: %{}

  defp place(%Zoned{zone: zone, offset_us: nil, name: nil}, path) when is_binary(zone) do
    if zone_name?(zone), do: %{"zone" => zone}, else: wrong_zoned(path, "zone must be the name of a time zone")
  end

  defp place(%Zoned{zone: nil, offset_us: offset, name: name}, path)
       when is_integer(offset) and abs(offset) < @day_us do
    cond do
      name == nil -> %{"offset_us" => offset}
      is_binary(name) and Text.valid?(name) -> %{"offset_us" => offset, "name" => name}
      true -> wrong_zoned(path, "name must be a string")
    end
  end

  defp place(_zoned, path),
    do: wrong_zoned(path, "it has either zone, or offset_us of less than a day with or without name")

  @spec wrong_zoned(Fault.path(), String.t()) :: no_return()
  defp wrong_zoned(path, message), do: not_serializable(path, "this Bridge.Zoned is none: #{message}", "Mend it.")

  defp timedelta?(days, seconds, micros) do
    is_integer(days) and is_integer(seconds) and is_integer(micros) and
      days in -999_999_999..999_999_999 and seconds in 0..86_399 and micros in 0..999_999
  end

  @spec decode(String.t(), map(), Fault.path()) :: struct()
  def decode("date", tree, path), do: iso(tree, ~r/\A[0-9]{4}-[0-9]{2}-[0-9]{2}\z/, Date, path)

  def decode("timedelta", tree, path) do
    [days, seconds, micros] = for name <- ~w(days seconds microseconds), do: member(tree, name, :integer, path)

    if timedelta?(days, seconds, micros) do
      %Timedelta{days: days, seconds: seconds, microseconds: micros}
    else
      malformed(path, ~s(a "timedelta" is out of range: 0 <= seconds < 86400, 0 <= microseconds < 1000000))
    end
  end

  def decode("time", tree, path),
    do: tree |> iso(~r/\A[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?\z/, Time, path) |> in_zone(tree, path)

  def decode("datetime", tree, path),
    do:
      tree
      |> iso(~r/\A[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]{6})?\z/, NaiveDateTime, path)
      |> in_zone(tree, path)

  defp iso(tree, pattern, module, path) do
    text = member(tree, "value", :string, path)

    with true <- text =~ pattern,
         {:ok, %{} = found} when not is_map_key(found, :year) or :erlang.map_get(:year, found) > 0 <-
           module.from_iso8601(text) do
      found
    else
      _ -> malformed(path, ~s("value" of a "#{tree["$bridge"]}" is not one in ISO 8601))
    end
  end

  defp in_zone(wall, tree, path) do
    zone = optional(tree, "zone", :string, path)
    offset = optional(tree, "offset_us", :integer, path)
    name = optional(tree, "name", :string, path)
    fold = Map.get(tree, "fold", 0)

    cond do
      zone && (offset || name) -> malformed(path, ~s(a moment has either "zone" or "offset_us"))
      zone && not zone_name?(zone) -> malformed(path, ~s("zone" is no name of a time zone))
      offset && abs(offset) >= @day_us -> malformed(path, ~s("offset_us" must be less than a day))
      name && !offset -> malformed(path, ~s("name" needs "offset_us"))
      fold !== 0 and fold !== 1 -> malformed(path, ~s("fold" must be 0 or 1))
      true -> natural(%Zoned{value: wall, zone: zone, offset_us: offset, name: name, fold: fold})
    end
  end

  # Elixir's own, where it says the same and is written back as it came.
  defp natural(%Zoned{value: wall, zone: nil, offset_us: nil, fold: 0}), do: wall

  defp natural(%Zoned{value: %NaiveDateTime{} = wall, offset_us: 0, name: nil, fold: 0}) do
    DateTime.from_naive!(wall, "Etc/UTC")
  end

  defp natural(%Zoned{value: %NaiveDateTime{} = wall, zone: zone, fold: fold} = zoned)
       when is_binary(zone) and zone != "Etc/UTC" do
    case DateTime.from_naive(wall, zone) do
      {:ok, moment} when fold == 0 -> moment
      {:ambiguous, first, second} -> if fold == 0, do: first, else: second
      _ -> zoned
    end
  end

  defp natural(zoned), do: zoned

  # It is looked up as a file by some: nothing but plain names may get there.
  defp zone_name?(text), do: text =~ ~r/\A[A-Za-z][A-Za-z0-9_+-]{0,31}(?:\/[A-Za-z][A-Za-z0-9_+-]{0,31}){0,2}\z/
end

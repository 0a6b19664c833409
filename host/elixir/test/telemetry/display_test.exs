defmodule Bridge.DisplayTest do
  use ExUnit.Case, async: true

  alias Bridge.Display
  alias Bridge.Display.Table

  doctest Display

  test "telemetry is told from what people are to see" do
    mime = "application/vnd.bridge.telemetry.v1+json"
    assert {:ok, [%{}]} = Display.telemetry(Display.new(%{"data" => %{mime => [%{}], "text/plain" => "✓"}}))
    assert :error = Display.telemetry(Display.new(%{"data" => %{"text/plain" => "✓"}}))
    assert :error = Display.telemetry(Display.new(%{"data" => %{mime => "no list"}}))
  end

  test "what is no image gives none" do
    assert :error = Display.image(Display.new(%{"data" => %{"image/png" => "***"}}))
    assert :error = Display.image(Display.new(%{"data" => %{"image/png" => %{"a" => 1}}}))
    assert :error = Display.image(Display.new(%{"data" => %{}}))
  end

  test "a long text is shown by its beginning" do
    shown = inspect(Display.new(%{"data" => %{"text/plain" => String.duplicate("x", 100_000)}}))
    assert String.length(shown) < 5_000
  end

  test "what is shown elsewhere later has an id, and a table stays one whatever is in its cells" do
    display = Display.new(%{"data" => %{}, "transient" => %{"display_id" => "d"}}, update: true)
    assert {display.display_id, display.update} == {"d", true}
    text = Table.text(["a", "b"], [["x\ny\e[2J", "1"], [String.duplicate("z", 200), "2"]])
    assert length(String.split(text, "\n")) == 3
    refute text =~ "\e"
    assert Table.html(["a"], [["<script>"]], "t") =~ "&lt;script&gt;"
    assert Table.text(["n"], for(n <- 1..300, do: ["#{n}"])) =~ "… and 100 more"
  end
end

defmodule Bridge.Wire.PeerTest do
  # Against real ZeroMQ sockets, a real kernel, and peers that are none.
  use ExUnit.Case, async: true

  alias Bridge.{JSON, TestKernels}
  alias Bridge.Wire.{Frames, Peer, RPC, ZMTP}

  @within 20_000

  setup_all do
    dir = directory()
    %{shared: sockets(dir)}
  end

  setup do: %{dir: directory()}

  for transport <- [:ipc, :tcp] do
    describe "with ZeroMQ's own sockets, by #{transport}" do
      setup %{shared: shared}, do: %{sockets: Map.fetch!(shared, unquote(transport))}

      test "messages go and come back as they were, whatever their sizes", %{sockets: sockets} do
        peer = connect(sockets.router, :dealer)

        for frames <- [
              ["a"],
              [""],
              ["", "", ""],
              [:binary.copy("x", 255), :binary.copy("y", 256)],
              [:rand.bytes(100_000), "", :rand.bytes(70_000)]
            ],
            reduce: peer do
          peer ->
            :ok = Peer.send(peer, ["echo" | frames])
            {[message], peer} = receive_messages(peer, 1)
            assert message == frames
            peer
        end
      end

      test "a message of 50 MiB goes and comes back", %{sockets: sockets} do
        peer = connect(sockets.router, :dealer)
        large = :crypto.strong_rand_bytes(50 * 0x10_0000)
        :ok = Peer.send(peer, ["echo", "first", large])
        {[["first", back]], _peer} = receive_messages(peer, 1)
        assert :erlang.md5(back) == :erlang.md5(large)
      end

      test "thousands of messages arrive in order, and one of thousands of frames", %{sockets: sockets} do
        peer = connect(sockets.router, :dealer)
        :ok = Peer.send(peer, ["count", "10000"])
        {messages, peer} = receive_messages(peer, 10_000)
        assert messages == for(n <- 0..9999, do: [Integer.to_string(n)])

        :ok = Peer.send(peer, ["frames", "4096"])
        {[message], _peer} = receive_messages(peer, 1)
        assert message == for(n <- 0..4095, do: Integer.to_string(n))
      end

      test "what is larger than the limit ends the connection", %{sockets: sockets} do
        peer = connect(sockets.router, :dealer, max_message_bytes: 1000, max_frames: 10)
        :ok = Peer.send(peer, ["size", "1000"])
        {[[_frame]], peer} = receive_messages(peer, 1)
        :ok = Peer.send(peer, ["size", "1001"])
        assert receive_error(peer) == :message_too_large
        assert {:error, :closed} = Peer.send(peer, ["echo", "x"])

        peer = connect(sockets.router, :dealer, max_frames: 10)
        :ok = Peer.send(peer, ["frames", "11"])
        assert receive_error(peer) == :too_many_frames
      end

      test "a subscription brings its topic and no other", %{sockets: sockets} do
        sub = connect(sockets.xpub, :sub)
        dealer = connect(sockets.router, :dealer)
        :ok = Peer.subscribe(sub, "hello-1")
        {[["hello-1", "welcome"]], sub} = receive_messages(sub, 1)

        :ok = Peer.send(dealer, ["publish", "other", "not for us"])
        :ok = Peer.send(dealer, ["publish", "hello-2", "neither"])
        :ok = Peer.send(dealer, ["publish", "hello-1.more", "for us"])
        assert {[["hello-1.more", "for us"]], _sub} = receive_messages(sub, 1)
      end

      test "a question of a REQ is answered", %{sockets: sockets} do
        peer = connect(sockets.rep, :req)
        :ok = Peer.send(peer, ["beat", "two"])
        {[["beat", "two"]], peer} = receive_messages(peer, 1)
        :ok = Peer.send(peer, [<<0, 255>>])
        assert {[[<<0, 255>>]], _peer} = receive_messages(peer, 1)
      end

      test "PINGs are answered, for who answers none is cut off", %{sockets: sockets} do
        peer = connect(sockets.strict, :dealer)
        :ok = Peer.send(peer, ["later", "600"])
        assert {[["600"]], _peer} = receive_messages(peer, 1)
      end

      test "a socket of a kind that does not fit is refused", %{sockets: sockets} do
        # It hangs up, with or without having said what it is.
        for {address, type} <- [{sockets.xpub, :dealer}, {sockets.router, :sub}, {sockets.xpub, :req}] do
          assert {:error, reason} = Peer.connect(address, type)
          assert reason in [:incompatible_peer, :closed]
        end
      end

      test "a peer that ends is said to have closed, and where it was nobody listens", %{dir: dir} do
        sockets = Map.fetch!(sockets(dir), unquote(transport))
        peer = connect(sockets.router, :dealer)
        :ok = Peer.send(peer, ["bye"])
        assert receive_error(peer) == :closed
        assert {:error, reason} = Peer.connect(sockets.router, :dealer)
        assert reason in [:econnrefused, :enoent]
      end

      test "connections of one process are told apart", %{sockets: sockets} do
        [one, two] = for _ <- 1..2, do: connect(sockets.router, :dealer)
        :ok = Peer.send(one, ["echo", "one"])
        assert_receive message, @within
        assert Peer.stream(two, message) == :unknown
        assert {:ok, _one, [["one"]]} = Peer.stream(one, message)
        assert Peer.stream(one, {:something, "else"}) == :unknown
      end

      test "after close nothing comes any more", %{sockets: sockets} do
        peer = connect(sockets.router, :dealer)
        :ok = Peer.send(peer, ["count", "10"])
        assert_receive message, @within
        Kernel.send(self(), message)
        :ok = Peer.close(peer)
        :ok = Peer.close(peer)
        refute_received _message
        assert {:error, :closed} = Peer.send(peer, ["echo", "x"])
      end
    end
  end

  describe "with a peer that is not as it should be" do
    test "a connection to nobody is refused, as the system says", %{dir: dir} do
      assert Peer.connect({:ipc, Path.join(dir, "nobody")}, :dealer) == {:error, :enoent}
      File.write!(Path.join(dir, "file"), "")
      assert Peer.connect({:ipc, Path.join(dir, "file")}, :dealer) == {:error, :econnrefused}
    end

    test "one that says nothing is not waited for longer than told", %{dir: dir} do
      {address, _socket} = pretend(dir, fn _socket -> :ok end)
      assert Peer.connect(address, :dealer, timeout: 50) == {:error, :timeout}
      refute_received _message
    end

    test "one that stops in the middle of its handshake neither", %{dir: dir} do
      {address, _socket} = pretend(dir, &:gen_tcp.send(&1, binary_part(hello("ROUTER"), 0, 70)))
      assert Peer.connect(address, :dealer, timeout: 50) == {:error, :timeout}
    end

    test "rubbish, and a peer that hangs up, end the handshake", %{dir: dir} do
      {address, _socket} = pretend(dir, &:gen_tcp.send(&1, "HTTP/1.1 400 Bad Request\r\n\r\n"))
      assert Peer.connect(address, :dealer) == {:error, :not_zmtp}

      {address, _socket} = pretend(dir, &:gen_tcp.close/1)
      assert {:error, reason} = Peer.connect(address, :dealer)
      assert reason in [:closed, :econnreset, :epipe]
    end

    test "what comes with the handshake is not lost", %{dir: dir} do
      {address, _socket} = pretend(dir, &:gen_tcp.send(&1, [hello("ROUTER"), ZMTP.message(["early"]), <<0, 5, "la">>]))
      {:ok, peer} = Peer.connect(address, :dealer)
      assert {[["early"]], _peer} = receive_messages(peer, 1)
    end

    test "bytes one by one are messages all the same", %{dir: dir} do
      bytes = hello("ROUTER") <> IO.iodata_to_binary([ZMTP.message(["a", "b"]), ZMTP.message(["c"])])

      {address, _socket} =
        pretend(dir, fn socket -> for <<byte <- bytes>>, do: :ok = :gen_tcp.send(socket, <<byte>>) end)

      {:ok, peer} = Peer.connect(address, :dealer)
      assert {[["a", "b"], ["c"]], _peer} = receive_messages(peer, 2)
    end

    test "messages before the rubbish arrive, and then the connection is closed", %{dir: dir} do
      {address, theirs} = pretend(dir, &:gen_tcp.send(&1, [hello("ROUTER"), ZMTP.message(["good"])]))
      {:ok, peer} = Peer.connect(address, :dealer)
      {[["good"]], peer} = receive_messages(peer, 1)
      theirs = theirs.()
      :ok = :gen_tcp.send(theirs, <<0xFF>>)
      assert receive_error(peer) == :malformed_frame
      assert drained(theirs) == :closed
    end

    test "messages before its end arrive too", %{dir: dir} do
      {address, _socket} =
        pretend(dir, fn socket ->
          :ok = :gen_tcp.send(socket, [hello("ROUTER"), ZMTP.message(["last"])])
          # Half closed, and not both ways: what it has not read would otherwise make the system forget what it sent.
          :gen_tcp.shutdown(socket, :write)
        end)

      {:ok, peer} = Peer.connect(address, :dealer)
      {[["last"]], peer} = receive_messages(peer, 1)
      assert receive_error(peer) == :closed
    end

    test "one that does not read is given up after the time to send, and its connection closed", %{dir: dir} do
      {address, theirs} = pretend(dir, &:gen_tcp.send(&1, hello("ROUTER")))
      {:ok, peer} = Peer.connect(address, :dealer, send_timeout: 50)
      megabyte = :binary.copy("x", 0x10_0000)
      # Buffers of the system take some.
      assert Enum.find_value(1..1000, fn _ -> unless Peer.send(peer, [megabyte]) == :ok, do: :given_up end)
      assert {:error, :closed} = Peer.send(peer, ["more"])
      assert drained(theirs.()) == :closed
    end
  end

  describe "with a real kernel" do
    for transport <- ["ipc", "tcp"] do
      test "by #{transport}: its heart beats, its welcome comes, and it says what it is", %{dir: dir} do
        key = Base.encode16(:rand.bytes(16), case: :lower)
        address = kernel(dir, unquote(transport), key)

        heart = connect_in_time(address.("hb"), :req)
        :ok = Peer.send(heart, ["beat"])
        assert {[["beat"]], _heart} = receive_messages(heart, 1)

        comm = Base.encode16(:rand.bytes(16), case: :lower)
        iopub = connect_in_time(address.("iopub"), :sub)
        :ok = Peer.subscribe(iopub, "comm-" <> comm)
        {[frames], iopub} = receive_messages(iopub, 1)
        assert {:ok, %{header: %{"msg_type" => "iopub_welcome"}}, seen} = Frames.unpack(frames, key, Frames.seen_new())

        shell = connect_in_time(address.("shell"), :dealer)
        :ok = Peer.send(shell, Frames.pack(key, "m-1", "kernel_info_request", "host", "{}"))
        {[frames], _shell} = receive_messages(shell, 1)
        assert {:ok, reply, seen} = Frames.unpack(frames, key, seen)
        assert %{"msg_type" => "kernel_info_reply"} = reply.header
        assert %{"msg_id" => "m-1"} = reply.parent
        assert %{"status" => "ok", "implementation" => "bridge"} = reply.content

        params = %{"protocol" => [1, 0], "host" => %{"name" => "test", "version" => "0"}}
        attach = Frames.comm_open(comm, "bridge.v1", JSON.encode!(RPC.request(1, "bridge.attach", params)))
        :ok = Peer.send(shell, Frames.pack(key, "m-2", "comm_open", "host", attach))
        {[frames], iopub} = receive_messages(iopub, 1)
        assert {:ok, message, seen} = Frames.unpack(frames, key, seen)
        assert {:result, 1, %{"protocol" => [1, 0]}} = RPC.decode(message.content["data"])

        # A value with a buffer, there and back.
        large = :rand.bytes(1000)
        value = %{"$bridge" => "bytes", "buffer" => 0}
        params = %{"function" => %{"kind" => "path", "path" => "builtins.bytes"}, "args" => [value]}
        call = Frames.comm_message(comm, JSON.encode!(RPC.request(2, "function.call", params)))
        :ok = Peer.send(shell, Frames.pack(key, "m-3", "comm_msg", "host", call, [large]))
        # Its telemetry may be here as well.
        {[frames | _telemetry], _iopub} = receive_messages(iopub, 1)
        assert {:ok, message, _seen} = Frames.unpack(frames, key, seen)
        assert message.buffers == [large]
        assert RPC.decode(message.content["data"]) == {:result, 2, %{"value" => value}}
      end
    end
  end

  # The messages that come next, `count` of them at least, oldest first.
  defp receive_messages(peer, count, received \\ []) do
    if length(received) >= count do
      {received, peer}
    else
      assert_receive message, @within
      assert {:ok, peer, more} = Peer.stream(peer, message)
      receive_messages(peer, count, received ++ more)
    end
  end

  defp receive_error(peer) do
    assert_receive message, @within

    case Peer.stream(peer, message) do
      {:ok, peer, []} -> receive_error(peer)
      {:error, %Peer{}, reason} -> reason
    end
  end

  defp connect(address, type, opts \\ []) do
    assert {:ok, peer} = Peer.connect(address, type, opts)
    peer
  end

  # A kernel that has just been started does not listen yet.
  defp connect_in_time(address, type, deadline \\ System.monotonic_time(:millisecond) + @within) do
    case Peer.connect(address, type) do
      {:ok, peer} ->
        peer

      {:error, reason} when reason in [:enoent, :econnrefused] ->
        assert System.monotonic_time(:millisecond) < deadline, "the kernel does not listen"
        connect_in_time(address, type, deadline)
    end
  end

  defp directory do
    # Short, for the path of a Unix socket is.
    dir = Path.join(System.tmp_dir!(), "bw#{System.unique_integer([:positive])}-#{System.pid()}")
    File.mkdir!(dir)
    File.chmod!(dir, 0o700)
    on_exit(fn -> File.rm_rf!(dir) end)
    dir
  end

  # Python's ZeroMQ sockets, in a process that ends with its port: by transport and name, where they listen.
  defp sockets(dir) do
    port = python([Path.expand("zmq_peer.py", __DIR__), dir])
    assert_receive {^port, {:data, {:eol, line}}}, @within
    assert {:ok, %{"libzmq" => "4." <> _} = sockets} = JSON.decode(line)

    for transport <- [:ipc, :tcp], into: %{} do
      addresses =
        for name <- [:router, :strict, :xpub, :rep], into: %{} do
          where = sockets[Atom.to_string(name)]
          {name, if(transport == :ipc, do: {:ipc, where["ipc"]}, else: {:tcp, "127.0.0.1", where["tcp"]})}
        end

      {transport, addresses}
    end
  end

  defp python(args) do
    env = [{~c"JPY_PARENT_PID", String.to_charlist(System.pid())}]

    port =
      Port.open({:spawn_executable, TestKernels.python()}, [:binary, :exit_status, line: 10_000, args: args, env: env])

    {:os_pid, os_pid} = Port.info(port, :os_pid)
    on_exit(fn -> System.cmd("kill", ["-9", Integer.to_string(os_pid)], stderr_to_stdout: true) end)
    port
  end

  # A kernel, and where each of its channels listens.
  defp kernel(dir, transport, key) do
    names = ["shell", "iopub", "stdin", "control", "hb"]

    {ip, ports} =
      case transport do
        "ipc" -> {Path.join(dir, "k"), Enum.with_index(names, 1)}
        "tcp" -> {"127.0.0.1", Enum.zip(names, free_ports(length(names)))}
      end

    info = Map.new(ports, fn {name, port} -> {name <> "_port", port} end)
    info = Map.merge(info, %{"key" => key, "signature_scheme" => "hmac-sha256", "transport" => transport, "ip" => ip})
    file = Path.join(dir, "kernel.json")
    File.write!(file, JSON.encode!(info))
    File.chmod!(file, 0o600)
    python(["-m", "bridge_kernel", "-f", file])

    fn name ->
      port = info[name <> "_port"]
      if transport == "ipc", do: {:ipc, "#{ip}-#{port}"}, else: {:tcp, ip, port}
    end
  end

  defp free_ports(count) do
    # All at once, so that they differ.
    sockets =
      for _ <- 1..count do
        {:ok, socket} = :gen_tcp.listen(0, ip: {127, 0, 0, 1})
        socket
      end

    for socket <- sockets do
      {:ok, port} = :inet.port(socket)
      :gen_tcp.close(socket)
      port
    end
  end

  # A listening socket where `act` is done with who connects; also how to get hold of that connection.
  defp pretend(dir, act) do
    path = Path.join(dir, "p#{System.unique_integer([:positive])}")
    {:ok, listening} = :gen_tcp.listen(0, [:binary, active: false, ip: {:local, path}])
    test = self()

    task =
      start_supervised!(
        {Task,
         fn ->
           {:ok, socket} = :gen_tcp.accept(listening)
           act.(socket)

           receive do
             :hand_over -> :ok = :gen_tcp.controlling_process(socket, test)
           end

           Kernel.send(test, {:handed_over, socket})
         end},
        id: path
      )

    :ok = :gen_tcp.controlling_process(listening, task)

    hand_over = fn ->
      Kernel.send(task, :hand_over)
      assert_receive {:handed_over, socket}, @within
      socket
    end

    {{:ipc, path}, hand_over}
  end

  # Reads until there is nothing more to come.
  defp drained(socket) do
    case :gen_tcp.recv(socket, 0, @within) do
      {:ok, _bytes} -> drained(socket)
      {:error, reason} -> reason
    end
  end

  defp hello(type) do
    ready = <<5, "READY", 11, "Socket-Type", byte_size(type)::32, type::binary>>
    <<0xFF, 0::64, 0x7F, 3, 0, "NULL", 0::128, 0, 0::248, 4, byte_size(ready), ready::binary>>
  end
end
